"""Command `gc`. It only parses and calls."""

from pathlib import Path
from typing import Annotated

import typer

from pixelclip.cli.pipeline import Cluster, Endpoint


def gc(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders with workspaces or runs of KFP's local runners; default: runs.")
    ] = None,
    older_than: Annotated[str, typer.Option(help="Delete what was last changed longer ago: 30d, 12h, 4w.")] = "",
    keep: Annotated[int | None, typer.Option(help="Never delete the newest N of each store.", min=0)] = None,
    max_size: Annotated[str, typer.Option(help="Delete the oldest beyond this size of each store: 50GB.")] = "",
    only: Annotated[list[str] | None, typer.Option(help="workspaces, mlflow, kfp or cache; may be repeated.")] = None,
    pipeline_root: Annotated[
        str, typer.Option(help="KFP's pipeline root, s3:// or minio://; default: KFP's runs are not deleted.")
    ] = "",
    cluster: Cluster = None,
    endpoint: Endpoint = "",
    delete: Annotated[bool, typer.Option("--delete", help="Delete; by default only print what would go, and why.")] = False,
) -> None:
    """Delete old workspaces, runs, artifacts and copies that no registered version needs; exit code 1 if some cannot be."""
    from pixelclip.cleanup.policy import Policy
    from pixelclip.commands.gc import run

    policy = Policy(older_than, keep, max_size)
    if run(policy, folders or (), only or (), pipeline_root, cluster, endpoint, delete):
        raise typer.Exit(1)
