"""Tiny test inputs from fixed seeds: a random CLIP, a finished model, a labelled set, an MLflow database."""

import json
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow warns about its own type hints
    import mlflow.pyfunc  # noqa: F401

from pixelclip.models.checkpoint import Clip, load_clip, save_model
from pixelclip.models.decoder import Decoder
from pixelclip.models.text import Prompts, TextTower
from pixelclip.storage.files import digest, write_json
from pixelclip.workflow.stage import PROVENANCE

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
CONVNEXT_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "timm_model_name": "test_convnext",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_drop": 0.0,
        "timm_drop_path": 0.1,
        "image_size": 64,
    },
    "text_cfg": CLIP_CONFIG["text_cfg"],
}
SIGLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 96,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "timm_model_name": "test_vit3",  # patches of 16 pixels, a grid of 10 x 10, pools by attention
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": 160,
    },
    "text_cfg": {
        "context_length": 64,
        "vocab_size": 64,
        "hf_tokenizer_name": "tests/tokenizer",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 32,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    },
}
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.3, 0.2)
SIDE, CONCEPTS, TOKENS = 48, 3, 2
CLASSES = ("dog, puppy", "grass", "sky")
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")


# Like `convnext_large_d_320`, whose projection is an MLP.
CONVNEXT_MLP_CONFIG = CONVNEXT_CONFIG | {"vision_cfg": CONVNEXT_CONFIG["vision_cfg"] | {"timm_proj": "mlp"}}
CLIP_CONFIGS = {"vit": CLIP_CONFIG, "convnext": CONVNEXT_CONFIG, "convnext_mlp": CONVNEXT_MLP_CONFIG, "siglip": SIGLIP_CONFIG}


def clip_config(folder: Path, config: dict[str, Any]) -> Path:
    """Write an open_clip folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    return folder


def clip_folder(folder: Path, seed: int = 0, kind: str = "vit", **vision: Any) -> Path:
    """Write an open_clip folder with random weights; `vision` replaces settings of the image tower in its config."""
    config = CLIP_CONFIGS[kind]
    clip_config(folder, config | {"vision_cfg": config["vision_cfg"] | vision})
    save_file(clip_state(seed, kind), folder / "open_clip_model.safetensors")
    if kind == "siglip":
        tokenizer_files(folder)
    return folder


def clip_of(kind: str = "vit", seed: int = 0) -> open_clip.CLIP | open_clip.CustomTextCLIP:
    """Create a CLIP with random weights."""
    clip = _empty(kind)
    clip.load_state_dict(clip_state(seed, kind))
    return clip


def _empty(kind: str) -> open_clip.CLIP | open_clip.CustomTextCLIP:
    config = dict(CLIP_CONFIGS[kind])
    return (open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP)(**config)


def tokenizer_files(folder: Path) -> Path:
    """Write a tokenizer like SigLIP's: SentencePiece's unigrams, `</s>` at the end, which is the padding, too."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        *letters,
        *(f"▁{x}" for x in letters),
        "▁photo",
        "▁of",
        "▁in",
        "▁the",
        "▁scene",
        "▁dog",
        "▁cat",
    ]
    tokenizer = Tokenizer(Unigram([(piece, -float(bool(piece[1:])) - 1) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def clip_state(seed: int = 0, kind: str = "vit") -> dict[str, torch.Tensor]:
    """Return the random weights of `clip_of`, in a new dictionary."""
    return dict(_clip_state(seed, kind))


@cache
def _clip_state(seed: int, kind: str) -> dict[str, torch.Tensor]:
    return _vary(_empty(kind).state_dict(), seed)


def _vary(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Replace weights by random ones that separate texts and positions; open_clip's initial values hardly do."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        norm = ("ln_" in name or "norm" in name) and name.endswith("weight")
        state[name] = 1 + 0.1 * noise if norm or name.endswith("gamma") else 0.15 * noise
    return state


def model_folder(folder: Path, clip: Path, change: float = 0.0, seed: int = 0) -> Path:
    """Write a finished model folder; its image tower is the CLIP's plus noise of size `change`."""
    folder.mkdir(parents=True)
    loaded: Clip = load_clip(str(clip))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.model.visual.parameters():
            parameter += change * torch.randn(parameter.shape, generator=generator)
    words = torch.randint(0, 49406, (CONCEPTS, TOKENS), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder()
    prompts = Prompts(TextTower(loaded.model), words)
    origin = {"spec": str(clip), "md5": digest(clip)["md5"]}
    save_model(folder, loaded, prompts, decoder, side=SIDE, residual="cls", origin=origin)
    write_json(folder / PROVENANCE, provenance(folder, clip))
    return folder


def provenance(folder: Path, clip: Path) -> dict[str, Any]:
    """Return the provenance of a training run and of its masks."""
    masks = {
        "stage": "masks",
        "fingerprint": "f1",
        "settings": {"generator": "given"},
        "inputs": {"shards": {"path": "/there/shards", "md5": "0" * 32, "num_files": 1, "size": 1}},
        "version": "0.1.0",
        "revision": "abc",
    }
    return {
        "stage": "train",
        "fingerprint": "f2",
        "settings": {"clip": str(clip), "steps": 3},
        "inputs": {
            "clip": {"path": str(clip), **digest(clip)},
            "masks": {"path": "/there/masks", "md5": "1" * 32, "num_files": 1, "size": 1, "provenance": masks},
        },
        "version": "0.1.0",
        "revision": "abc",
        "output": digest(folder, [path for path in folder.iterdir() if path.name in MODEL_FILES]),
    }


def labelled_set(folder: Path, classes: Sequence[str] = CLASSES, images: int = 3, seed: int = 0) -> Path:
    """Write noise images of several sizes whose label maps have all classes but the last, and ignored pixels."""
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    (folder / "classes.txt").write_text("\n".join(classes) + "\n")
    for number in range(images):
        height, width = 20 + 7 * number, 40 - 5 * number
        blocks = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((width, height)).save(folder / "images" / f"{number}.png")
        labels = random.integers(0, len(classes) - 1, (height, width), dtype=np.uint8)
        labels[:3] = 255
        Image.fromarray(labels).save(folder / "labels" / f"{number}.png")
    return folder


def git(folder: Path, *words: str) -> str:
    """Run git with a fixed user, independent of the machine's configuration."""
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def dvc_repository(folder: Path, remote: str, tracked: dict[str, dict[str, bytes]], plain: dict[str, bytes]) -> str:
    """Create a git repository whose DVC remote contains the `tracked` folders and files; return its commit, tagged v1.

    Args:
        folder: the new repository.
        remote: a folder or s3://; DVC reads the credentials from the environment.
        tracked: maps each path that DVC tracks to the files below it ("" for a file itself).
        plain: files in git.
    """
    from dvc.repo import Repo

    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    with Repo.init(str(folder)) as repo:
        with repo.config.edit() as config:
            config["core"] = {"remote": "store", "analytics": False}
            config["remote"] = {"store": {"url": remote}}
        for path, files in tracked.items():
            for name, content in files.items():
                (folder / path / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / path / name).write_bytes(content)
        for name, content in plain.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        repo.add([str(folder / path) for path in tracked])
        repo.push()
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "data")
    git(folder, "tag", "v1")
    return git(folder, "rev-parse", "HEAD")


@cache
def _database() -> bytes:
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # each of dozens of migrations waits for the disk
    with tempfile.TemporaryDirectory(dir=memory) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own use of SQLAlchemy
        path = Path(folder, "template.db")
        MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
        return path.read_bytes()


def mlflow_at(monkeypatch: pytest.MonkeyPatch, folder: Path, copy_of: Path | None = None) -> MlflowClient:
    """Set MLflow to an empty database in `folder`, copied from a template because MLflow takes seconds to create one."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "PIXELCLIP_PIPELINE"))]:
        monkeypatch.delenv(name)
    folder.mkdir(parents=True, exist_ok=True)
    if copy_of is None:
        (folder / "mlflow.db").write_bytes(_database())
    else:
        shutil.copyfile(copy_of, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")  # a thread that tests start only on purpose
    return MlflowClient(uri)
