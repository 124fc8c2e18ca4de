"""The command `pixelclip app`. It only parses and calls."""

from typing import Annotated

import typer

from pixelclip.config import device_name


def app(
    model: Annotated[
        list[str], typer.Option(help="Model folder, s3://bucket/folder, or models:/NAME@ALIAS; repeat it to compare models.")
    ],
    classes: Annotated[str, typer.Option(help="Class names in the text field at first.")] = "",
    examples: Annotated[str, typer.Option(help="Folder of example photos, or s3://bucket/folder.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is reachable from other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port.", min=1, max=65535)] = 7860,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Open a page to try models in a browser: drop a photo, name classes, compare with CLIP."""
    from pixelclip.api import model_path
    from pixelclip.storage.download import local_path

    device_name(device)
    try:
        from pixelclip.app.launch import run
    except ModuleNotFoundError as error:
        raise ValueError(f"the page needs the extra `app` (pip install 'pixelclip[app]'): {error.name} is missing") from None
    photos = local_path(examples) if examples else None
    named = [(spec.removeprefix("models:/"), model_path(spec)) for spec in dict.fromkeys(model)]
    run(named, classes, photos, host, port, device)
