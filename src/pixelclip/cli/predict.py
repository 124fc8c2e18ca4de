"""The commands `predict` and `merge`."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pixelclip import api
from pixelclip.cli.pipeline import reject_s3
from pixelclip.config import PredictConfig, Quality, device_name
from pixelclip.data.class_names import names_of


def predict(
    photos: Annotated[str, typer.Argument(help="Image, folder, 'glob', shards (folder of tars or manifest), or s3://.")],
    classes: Annotated[
        str, typer.Option(help='"dog|puppy,grass,sky" (bar between synonyms), or a .txt file, one class per line.')
    ],
    model: Annotated[str, typer.Option(help="Model folder, s3://bucket/folder, or models:/NAME@ALIAS.")],
    out: Annotated[
        str,
        typer.Option(help="For one photo a PNG file, with *.overlay.png beside it; else a folder or s3://bucket/folder."),
    ],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    quality: Annotated[Quality, typer.Option(help="fast (one view) or best (refined, several times slower).")] = "fast",
    overlays: Annotated[bool, typer.Option(help="Folder: also write the images in the colours of their classes.")] = True,
    label_studio: Annotated[bool, typer.Option("--label-studio", help="Folder: also write tasks for Label Studio.")] = False,
    part: Annotated[str, typer.Option(help="i/n: only the i-th of n parts of the images or shards; see merge.")] = "",
    max_bad_share: Annotated[
        float, typer.Option(help="Folder: maximum fraction of unreadable images.", min=0, max=1)
    ] = PredictConfig.model_fields["max_bad_share"].default,
) -> None:
    """Segment a photo, or a folder or bucket of them, into the given classes."""
    from pixelclip.data.images import IMAGE_SUFFIXES

    names = names_of(classes)
    settings = {"device": device, "quality": quality, "overlays": overlays, "label_studio": label_studio, "part": part}
    if Path(out).suffix.lower() in IMAGE_SUFFIXES:
        if part or label_studio or not overlays:
            raise ValueError(f"{out}: --part, --label-studio and --no-overlays are for folders: name a folder as --out")
        with _without_collector():
            _predict_one(photos, names, model, reject_s3(Path(out)), device, quality)
    else:
        api.predict(photos, names, model, out, **settings, max_bad_share=max_bad_share)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause garbage collection, which among the objects of torch's import takes a quarter of the time of a single photo."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # for the end of the process, too
        gc.enable()


def _predict_one(photo: str, names: list[str], model: str, out: Path, device: str, quality: Quality) -> None:
    from pixelclip.data.images import open_image
    from pixelclip.inference.segmenter import saved_files
    from pixelclip.storage.download import local_path
    from pixelclip.storage.files import check_writable

    device_name(device)
    files = saved_files(out)
    source = local_path(photo)
    if source.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"{out}: would overwrite the photo")
    if source.is_dir():
        raise ValueError(f"{photo}: is a folder; its results need a folder, too: --out {out.with_suffix('')}")
    image = open_image(source)
    check_writable(out)
    result = api.load(model, device)(image, names, quality)
    result.save(out)
    shares = sorted(((share, name) for name, share in result.shares.items() if share), reverse=True)
    print("\n".join(f"{100 * share:5.1f} %  {name}" for share, name in shares))
    print(f"{out} (values are class indices), {files[1]}")


def merge(
    parts: Annotated[str, typer.Argument(help="Folder or s3://bucket/folder with the outputs of predict --part i/n.")],
    out: Annotated[str, typer.Option(help="Output folder or s3://bucket/folder.")],
) -> None:
    """Merge the parts of a prediction."""
    api.merge(parts, out)
