"""Start the page for models of the registry or of folders."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pixelclip.app.page import MAX_VISITORS, build
from pixelclip.data.images import IMAGE_SUFFIXES
from pixelclip.inference.limits import Limits
from pixelclip.inference.loading import Model
from pixelclip.inference.predictor import Predictor
from pixelclip.models.checkpoint import read_config
from pixelclip.storage.files import no_such
from pixelclip.toy_scenes.scenes import CLASSES, paint
from pixelclip.workflow.failures import first_line

TOY = "toy"
_SCENE_SEED, _SCENE_SIDE, _SCENES = 4711, 128, range(4)
"""Painted examples; the seed is none of those used for training or evaluation."""


def run(models: Sequence[tuple[str, Path]], classes: str, examples: Path | None, host: str, port: int, device: str) -> None:
    """Serve the page until SIGTERM or Ctrl-C.

    Args:
        models: names that visitors see, each with its model folder.
        classes: class names in the text field at first; empty: those of the toy scenes.
        examples: folder of example photos; by default painted scenes if a model is a toy.
        host: address to listen on; 127.0.0.1 is reachable from this machine only.
        port: TCP port.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        ValueError: a model cannot be loaded, or the folder of examples contains no image.
        OSError: the port is in use.
    """
    segmenters, specs = load(models, device)
    toy, classes = TOY in specs, classes or ", ".join(CLASSES)
    with tempfile.TemporaryDirectory(prefix="pixelclip_examples_") as folder:
        if examples is not None:
            if not examples.is_dir():
                raise ValueError(no_such(examples, "folder of example photos"))
            photos = sorted(path for path in examples.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
            if not photos:
                raise ValueError(f"{examples}: contains no image")
            shown = [(str(photo.absolute()), classes) for photo in photos]
        else:
            shown = _painted(Path(folder)) if toy else []
        limits = Limits.load({})
        page = build(segmenters, classes, shown, _note(toy), limits)
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,  # of a file that is no image, too
            footer_links=[],
            max_file_size=limits.max_bytes,
            allowed_paths=[photo for photo, _ in shown],
            state_session_capacity=MAX_VISITORS,
        )
        print(f"pixelclip app: http://{host}:{port}  (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(3600)


def load(models: Sequence[tuple[str, Path]], device: str) -> tuple[dict[str, Model], set[str]]:
    """Load models, and before them each CLIP that one of them began as.

    Returns:
        Models by name, CLIPs first, and how settings name these CLIPs (`toy`, `ViT-B-16-quickgelu:openai`, ...).
    """
    trained: dict[str, Model] = {}
    clips: dict[str, Model] = {}
    specs: set[str] = set()
    for name, folder in models:
        trained[name] = predictor = Predictor.load(folder, device)
        spec = str(read_config(folder)["clip"]["spec"])
        label = f"CLIP ({spec}, {predictor.side} pixels)"
        specs.add(spec)
        if label in clips:
            continue
        try:
            clips[label] = Predictor.load(folder, device, original_clip=True)
        except ValueError as error:
            print(f"the page does not show the CLIP of {name}: {first_line(error)}", flush=True)
    return clips | trained, specs


def _painted(folder: Path) -> list[tuple[str, str]]:
    """Paint example scenes; return their paths, each with the names of its classes."""
    scenes = []
    for index in _SCENES:
        scene = paint(_SCENE_SEED, index, _SCENE_SIDE)
        Image.fromarray(scene.image).save(folder / f"scene_{index}.png")
        names = ", ".join(CLASSES[label] for label in np.unique(scene.label))
        scenes.append((str(folder / f"scene_{index}.png"), names))
    return scenes


def _note(toy: bool) -> str:
    """Return the text under the title of the page."""
    text = "Choose a photo, name its classes, and compare CLIP on the left with PixelCLIP on the right."
    if toy:
        text += (
            "\n\n**The toy model** has learned from painted scenes only. It knows these words: "
            f"{', '.join(CLASSES)}. On photographs it is of no use."
        )
    return text
