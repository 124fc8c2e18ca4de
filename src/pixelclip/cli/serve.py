"""Commands below `pixelclip serve`. They only parse and call."""

from importlib import import_module
from types import ModuleType
from typing import Annotated

import typer

from pixelclip.cli.help import Group

Registered = Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")]
Follow = Annotated[
    int,
    typer.Option(
        metavar="SECONDS", help="Look at the alias every SECONDS and roll out its new version; 0: serve one version.", min=0
    ),
]

serve = typer.Typer(cls=Group, help="Serve a registered model over HTTP, here or with KServe.", no_args_is_help=True)


@serve.command("run")
def serve_run(
    model: Registered,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts requests from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 5107,
    follow: Follow = 0,
) -> None:
    """Serve a registered model until Ctrl-C: POST /invocations, GET /ping, /model, /metrics."""
    if follow:
        _command("rollout").run(model, host, port, follow)
    else:
        _command("serve").run(model, host, port)


@serve.command("manifest")
def serve_manifest(
    model: Registered,
    image: Annotated[str, typer.Option(help="Container image by tag or digest; default: PIXELCLIP_IMAGE.")] = "",
    tracking_uri: Annotated[str, typer.Option(help="URL of MLflow inside the cluster; default: MLFLOW_TRACKING_URI.")] = "",
    follow: Follow = 0,
) -> None:
    """Print a KServe InferenceService for a registered model, as YAML."""
    print(_command("serve").manifest(model, image, tracking_uri, follow), end="")


def _command(name: str) -> ModuleType:
    try:
        return import_module(f"pixelclip.commands.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs the extra `train` (pip install 'pixelclip[train]'): {error.name} is missing") from None
