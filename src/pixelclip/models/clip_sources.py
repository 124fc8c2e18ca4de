"""Locate and identify the weights of a CLIP."""

from importlib import resources
from pathlib import Path

from pixelclip.storage.download import local_copy
from pixelclip.storage.files import digest


def clip_folder(spec: str) -> Path | None:
    """Return the file or folder of a `clip` setting, or None for open_clip's pretrained weights."""
    if spec == "toy":
        return Path(str(resources.files("pixelclip") / "assets" / "toy_clip"))
    if Path(spec).is_dir():
        return Path(spec)
    weights = spec.partition(":")[2]
    if "://" in weights:
        return local_copy(weights)
    return Path(weights) if weights and Path(weights).is_file() else None


def check_trained_from(spec: str, md5: str, model: Path, trained_md5: str | None, advice: str = "") -> None:
    """Check that the file or folder of a `clip` setting is the CLIP that a model was trained from.

    Args:
        spec: the setting.
        md5: of its file or folder.
        model: model folder, for the message.
        trained_md5: of the training's CLIP; nothing is checked if it is unknown.
        advice: end of the message.

    Raises:
        ValueError: it is another CLIP.
    """
    if trained_md5 and md5 != trained_md5:
        raise ValueError(f"{clip_folder(spec)}: is not the CLIP that {model} was trained from (the md5 differs){advice}")


def clip_version(spec: str) -> str:
    """Identify the weights of a `clip` setting: return the setting, plus the MD5 of a file or folder."""
    weights = clip_folder(spec)
    return spec if weights is None else f"{spec} md5 {digest(weights)['md5']}"
