"""Tokenizers from the files of the Hugging Face hub, for text towers without CLIP's own (SigLIP, SigLIP2)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from open_clip.tokenizer import get_clean_fn
from tokenizers import Tokenizer
from torch import Tensor

from pixelclip.models.hub import cached_or_online
from pixelclip.storage.files import digest
from pixelclip.workflow.failures import first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""Its files in a folder: the tokenizer, and its padding token."""


class FileTokenizer:
    """Tokenize texts like `open_clip.tokenizer.HFTokenizer`, without the package transformers.

    Args:
        folder: contains `TOKENIZER_FILES`.
        context_length: number of positions; longer texts are truncated, shorter ones padded.
        clean: open_clip's name of the function that cleans a text first.

    Raises:
        ValueError: a file is missing or unreadable, or names no padding token.
    """

    def __init__(self, folder: Path, context_length: int, clean: str = "whitespace") -> None:
        names = " and ".join(TOKENIZER_FILES)
        if missing := [name for name in TOKENIZER_FILES if not (folder / name).is_file()]:
            raise ValueError(f"{folder}: {missing[0]} is missing; this CLIP's tokenizer needs {names} there")
        self.files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES}
        self.context_length = context_length
        try:
            self._tokenizer, self._untruncated = (Tokenizer.from_buffer(self.files[TOKENIZER_FILES[0]]) for _ in range(2))
            pad = json.loads(self.files[TOKENIZER_FILES[1]]).get("pad_token")
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"{folder}: {names} cannot be read: {first_line(error)}") from None
        token = pad["content"] if isinstance(pad, dict) else pad
        index = None if token is None else self._tokenizer.token_to_id(token)
        if index is None:
            path = folder / TOKENIZER_FILES[1]
            raise ValueError(f"{path}: pad_token must be a token of {TOKENIZER_FILES[0]}, found {token!r}")
        self._untruncated.no_truncation()
        self._untruncated.no_padding()
        self._tokenizer.enable_truncation(context_length)
        self._tokenizer.enable_padding(length=context_length, pad_id=index, pad_token=token)
        self._clean = get_clean_fn(clean)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return token ids [N, T]."""
        encoded = self._tokenizer.encode_batch([self._clean(text) for text in texts])
        return torch.tensor([each.ids for each in encoded])

    def encode(self, text: str) -> list[int]:
        """Return all token ids of a text, with those for its start and end."""
        return list(self._untruncated.encode(self._clean(text)).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self._untruncated.decode(list(ids)))

    def whole_words(self) -> list[int]:
        """Return the ids of tokens that are a whole word of letters, by SentencePiece's mark of a word's start."""
        start = "\u2581"
        tokens = ((index, token) for token, index in self._tokenizer.get_vocab().items())
        return sorted(index for index, token in tokens if token.startswith(start) and token.removeprefix(start).isalpha())

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files to a folder."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def describe_tokenizer(weights: Path) -> dict[str, dict[str, Any]]:
    """Identify the tokenizer beside a file of weights, as the input `tokenizer` of a stage; empty if there is none."""
    files = [weights.parent / name for name in TOKENIZER_FILES]
    if weights.is_dir() or not all(file.is_file() for file in files):
        return {}
    return {"tokenizer": {"path": str(files[0]), **digest(weights.parent, files)}}


def load_tokenizer(text_cfg: dict[str, Any], folder: Path | None) -> FileTokenizer | None:
    """Load the tokenizer that a CLIP's config names, or return None for CLIP's own.

    Args:
        text_cfg: section of open_clip's config.
        folder: read the files here; None downloads them from the hub once.

    Raises:
        ValueError: as `FileTokenizer`; the config has options that are not supported, or the files cannot be had.
    """
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    clean = options.pop("clean", "whitespace")
    name = text_cfg.get("hf_tokenizer_name")
    if not name and not text_cfg.get("tokenizer_kwargs"):
        return None
    if not name or options or text_cfg.get("tokenizer_mode"):
        raise ValueError(
            f"its tokenizer is not supported (text_cfg: {name or 'no hf_tokenizer_name'}, tokenizer_kwargs {options}, "
            f"tokenizer_mode {text_cfg.get('tokenizer_mode')}); supported are CLIP's own without options, and "
            "hf_tokenizer_name with the option clean (SigLIP, SigLIP2)"
        )
    return FileTokenizer(folder or _download(name), int(text_cfg.get("context_length", 77)), clean)


def _download(repo: str) -> Path:
    with cached_or_online() as unreachable:
        try:
            paths = [Path(huggingface_hub.hf_hub_download(repo, name)) for name in TOKENIZER_FILES]
            return paths[0].parent
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = unreachable or first_line(error)
    raise ValueError(
        f"its tokenizer ({repo}) is not on this machine and cannot be downloaded ({reason}); "
        f"put its {' and '.join(TOKENIZER_FILES)} beside a local FILE in NAME:FILE"
    )
