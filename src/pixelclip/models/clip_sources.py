"""Locate the weights of a CLIP and identify them."""

from importlib import resources
from pathlib import Path

from pixelclip.storage.download import local_copy
from pixelclip.storage.files import digest


def clip_folder(spec: str) -> Path | None:
    """Return the file or folder that a `clip` setting refers to, or None for pretrained weights of open_clip."""
    if spec == "toy":
        return Path(str(resources.files("pixelclip") / "assets" / "toy_clip"))
    if Path(spec).is_dir():
        return Path(spec)
    weights = spec.partition(":")[2]
    if "://" in weights:
        return local_copy(weights)
    return Path(weights) if weights and Path(weights).is_file() else None


def clip_version(spec: str) -> str:
    """Return an identifier of the current weights of a `clip` setting: the setting, plus the MD5 of weights in files."""
    weights = clip_folder(spec)
    return spec if weights is None else f"{spec} md5 {digest(weights)['md5']}"
