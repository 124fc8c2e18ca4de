"""Commands below `pixelclip pipeline` that call Kubeflow Pipelines: submit, status, schedule. They contain no logic."""

from pathlib import Path
from typing import Annotated

import typer

from pixelclip.config import parse_overrides

Params = Annotated[Path | None, typer.Option(help="YAML file with one section per stage.")]
Cluster = Annotated[
    Path | None, typer.Option(help="Settings of the cluster; default: cluster.yaml of the current folder, if it exists.")
]
Nodes = Annotated[int, typer.Option(help="Training nodes; several need Kubeflow Trainer and a shared volume.", min=1)]
Image = Annotated[str, typer.Option(help="Container image by tag or digest; default: PIXELCLIP_IMAGE, or cluster.yaml's.")]
Repo = Annotated[str, typer.Option(help="DVC repository with --images and --labelled; empty: they are folders.")]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of --repo; empty: its default branch.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Pipeline parameters, or STAGE.SETTING=VALUE.")
]
Endpoint = Annotated[str, typer.Option(help="URL of KFP; default: KFP_ENDPOINT, KF_PIPELINES_ENDPOINT, or cluster.yaml's.")]
Images = Annotated[str, typer.Option(help="Unlabelled images on the cluster: path in --repo, folder or s3://.")]
Labelled = Annotated[str, typer.Option(help="Labelled set, given like --images: images/, labels/ and classes.txt.")]
Workspace = Annotated[str, typer.Option(help="Folder on a mounted volume where stages are reused and resumed; empty: none.")]

schedule = typer.Typer(help="Run the pipeline on a schedule: create, list, delete.", no_args_is_help=True)


def submit(
    images: Images,
    labelled: Labelled,
    repo: Repo = "",
    revision: Revision = "",
    workspace: Workspace = "",
    params: Params = None,
    name: Annotated[str, typer.Option(help="Name of the run; default: name of the pipeline with the time.")] = "",
    cluster: Cluster = None,
    nodes: Nodes = 1,
    image: Image = "",
    endpoint: Endpoint = "",
    settings: Overrides = None,
) -> None:
    """Start a run on Kubeflow Pipelines, as a new version of the pipeline if it changed; print its URL."""
    from pixelclip_pipelines.run import arguments
    from pixelclip_pipelines.submit import Target
    from pixelclip_pipelines.submit import submit as start

    checked = arguments(images, labelled, workspace, params, parse_overrides(settings or []), repo, revision)
    start(checked, Target(endpoint, cluster, nodes, image), name)


def status(
    run_id: Annotated[str, typer.Argument(help="Id of a run, as submit prints it.")],
    cluster: Cluster = None,
    endpoint: Endpoint = "",
) -> None:
    """Print a run's steps and states; exit code 0: succeeded, 1: failed or cancelled, 3: running."""
    from pixelclip_pipelines.submit import Target
    from pixelclip_pipelines.submit import status as run_status

    lines, code = run_status(Target(endpoint, cluster), run_id)
    print("\n".join(lines))
    raise typer.Exit(code)


@schedule.command("create")
def schedule_create(
    name: Annotated[str, typer.Argument(help="Name of the schedule.")],
    images: Images,
    labelled: Labelled,
    cron: Annotated[
        str, typer.Option(help="'MINUTE HOUR DAY MONTH WEEKDAY' in KFP's time zone, for example '0 3 * * 1'.")
    ] = "",
    every: Annotated[str, typer.Option(help="Or an interval: 30m, 6h, 1d.")] = "",
    repo: Repo = "",
    revision: Revision = "",
    workspace: Workspace = "",
    params: Params = None,
    cluster: Cluster = None,
    nodes: Nodes = 1,
    image: Image = "",
    endpoint: Endpoint = "",
    settings: Overrides = None,
) -> None:
    """Run the pipeline on a schedule, one run at a time; missed runs are skipped."""
    from pixelclip_pipelines.run import arguments
    from pixelclip_pipelines.submit import Target
    from pixelclip_pipelines.submit import schedule as create

    checked = arguments(images, labelled, workspace, params, parse_overrides(settings or []), repo, revision)
    create(checked, Target(endpoint, cluster, nodes, image), name, cron, every)


@schedule.command("list")
def schedule_list(cluster: Cluster = None, endpoint: Endpoint = "") -> None:
    """Print the schedules of the experiment."""
    from pixelclip_pipelines.submit import Target, schedules

    print("\n".join(schedules(Target(endpoint, cluster))) or "no schedules")


@schedule.command("delete")
def schedule_delete(
    schedule_id: Annotated[str, typer.Argument(help="Id of a schedule, as list prints it.")],
    cluster: Cluster = None,
    endpoint: Endpoint = "",
) -> None:
    """Delete a schedule; runs that it has started continue."""
    from pixelclip_pipelines.submit import Target, unschedule

    unschedule(Target(endpoint, cluster), schedule_id)
    print(f"schedule {schedule_id} is deleted")
