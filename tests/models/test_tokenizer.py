"""Tokenizers from files; `open_clip.tokenizer.HFTokenizer` itself needs transformers, which is not installed."""

import json
import time

import pytest

from helpers import tiny
from pixelclip.models.checkpoint import load_clip
from pixelclip.models.tokenizer import FileTokenizer, load_tokenizer

TEXT_CFG = tiny.SIGLIP_CONFIG["text_cfg"]
PIECES = ["<pad>", "</s>", "<unk>"]


@pytest.fixture
def folder(tmp_path):
    return tiny.tokenizer_files(tmp_path / "tokenizer")


def test_texts_are_cleaned_ended_padded_and_truncated(folder):
    vocabulary = {
        piece: index for index, (piece, _) in enumerate(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    }
    photo, dog, end = (vocabulary[piece] for piece in ("▁photo", "▁dog", "</s>"))
    tokens = FileTokenizer(folder, 6, "canonicalize")(["Photo,  DOG!", "", "dog dog dog dog dog dog dog"])
    assert tokens.tolist() == [[photo, dog, end, end, end, end], [end] * 6, [dog] * 5 + [end]]
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    assert FileTokenizer(folder, 3)(["dog"]).tolist() == [[dog, end, vocabulary["<pad>"]]]


def test_saved_tokenizer_is_the_same(folder, tmp_path):
    tokenizer = FileTokenizer(folder, 64)
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    assert FileTokenizer(tmp_path / "copy", 64)(["a dog"]).equal(tokenizer(["a dog"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer_config.json", None, "tokenizer_config.json is missing"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("tokenizer_config.json", "{}", "pad_token must be a token of tokenizer.json, found None"),
        ("tokenizer_config.json", '{"pad_token": "cat"}', "pad_token must be a token of tokenizer.json, found 'cat'"),
    ],
)
def test_unusable_files_are_named(folder, name, content, message):
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        FileTokenizer(folder, 64)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"tokenizer_kwargs": {"strip_sep_token": True}}, {"tokenizer_mode": "clips"}, {"hf_tokenizer_name": None}],
)
def test_options_that_change_tokens_are_refused(folder, change):
    assert load_tokenizer({"context_length": 77}, folder) is None
    with pytest.raises(ValueError, match=r"tokenizer is not supported .*; supported are .*SigLIP"):
        load_tokenizer(TEXT_CFG | change, folder)


def test_tokenizer_that_cannot_be_downloaded_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"tests/tokenizer.* cannot be downloaded .*beside a local FILE") as error:
        load_tokenizer(TEXT_CFG, None)
    assert time.monotonic() - start < 20 and "\n" not in str(error.value)


def test_file_of_a_siglip_brings_its_tokenizer_and_statistics(monkeypatch, tmp_path):
    tiny.clip_folder(tmp_path, kind="siglip")
    monkeypatch.setattr("open_clip.get_model_config", lambda name: json.loads(json.dumps(tiny.SIGLIP_CONFIG)))
    monkeypatch.setattr("open_clip.factory.get_model_config", lambda name: json.loads(json.dumps(tiny.SIGLIP_CONFIG)))
    clip = load_clip(f"ViT-B-16-SigLIP:{tmp_path / 'open_clip_model.safetensors'}")
    assert (clip.mean, clip.std) == ((0.5,) * 3, (0.5,) * 3)
    assert clip.tokenizer is not None and clip.tokenizer(["dog"]).shape == (1, 64)
