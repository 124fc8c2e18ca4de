"""Check that the CLIP of a `clip` setting can be had, without loading or downloading it."""

import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
from huggingface_hub.errors import HfHubHTTPError

from pixelclip.models.checkpoint import CLIP_CONFIG, MAX_MESSAGE, check_name, read_clip_config
from pixelclip.models.clip_sources import clip_folder
from pixelclip.storage.download import check_exists
from pixelclip.workflow.failures import first_line

_TIMEOUT = 10.0  # seconds per request


def check_clip(spec: str) -> None:
    """Check that a CLIP exists and its weights can be had, without loading or downloading them.

    Args:
        spec: see `load_clip`.

    Raises:
        ValueError: the name is unknown, or the file, URL or download does not exist or cannot be reached.
    """
    name, _, weights = spec.partition(":")
    if "://" in weights:
        check_name(spec, Path(weights))
        check_exists(weights)
    elif (folder := clip_folder(spec)) is None:
        check_name(spec, None)
        _check_pretrained(spec, open_clip.get_pretrained_cfg(name, weights))
    elif not folder.is_dir():
        check_name(spec, folder)
    elif not (folder / CLIP_CONFIG).is_file():
        raise ValueError(f"CLIP {spec!r}: {folder}/{CLIP_CONFIG}: no such file")


def patch_of(spec: str) -> int | None:
    """Return the side in pixels of the patches of a CLIP that `check_clip` accepts, or None for a tower of timm."""
    folder = None if "://" in spec else clip_folder(spec)
    name = spec.partition(":")[0]
    config = read_clip_config(folder)["model_cfg"] if folder and folder.is_dir() else open_clip.get_model_config(name)
    patch = config["vision_cfg"].get("patch_size")
    return patch if isinstance(patch, int) else None


def _check_pretrained(spec: str, source: dict[str, Any]) -> None:
    """Raise ValueError unless one of the files that open_clip would load is cached or offered for download."""
    if not source.get("hf_hub"):
        check_exists(source["url"])
        return
    repo, name = os.path.split(source["hf_hub"])
    files = [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    reason = ""
    for file in dict.fromkeys(each for name in files for each in (re.sub(r"\.(bin|pth?)$", ".safetensors", name), name)):
        if isinstance(huggingface_hub.try_to_load_from_cache(repo, file), str):
            return
        try:
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo, file), timeout=_TIMEOUT)
            return
        except HfHubHTTPError as error:  # the hub answers, but not with this file
            reason = reason or first_line(error)[:MAX_MESSAGE]
        except Exception as error:  # of httpx
            reason = first_line(error)[:MAX_MESSAGE]
            break
    raise ValueError(f"CLIP {spec!r}: the weights ({repo}) cannot be downloaded: {reason}")
