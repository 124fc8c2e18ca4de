"""Commands below `pixelclip pipeline`. They only parse and call."""

from pathlib import Path
from typing import Annotated

import typer

from pixelclip.cli.help import Group
from pixelclip.config import PredictConfig, Quality
from pixelclip.settings import parse_overrides


def reject_s3(path: Path) -> Path:
    """Raise ValueError for an s3:// URI, which would become a folder called `s3:`; return a local path."""
    if path.parts[:1] and path.parts[0].lower() == "s3:":
        raise ValueError(f"s3://{Path(*path.parts[1:])}: must be a path on this machine")
    return path


Params = Annotated[Path | None, typer.Option(help="YAML file with one section per stage.")]
Sweep = Annotated[Path, typer.Argument(help="YAML file with rows of settings, or ranges to search, and seeds.")]
YamlOut = Annotated[Path, typer.Option(callback=reject_s3, help="YAML file to write.")]
Cluster = Annotated[
    Path | None, typer.Option(help="Settings of the cluster; default: cluster.yaml of the current folder, if it exists.")
]
Nodes = Annotated[int, typer.Option(help="Training nodes; several need Kubeflow Trainer and a shared volume.", min=1)]
Image = Annotated[str, typer.Option(help="Container image by tag or digest; default: PIXELCLIP_IMAGE, or cluster.yaml's.")]
Repo = Annotated[str, typer.Option(help="DVC repository with --images and --labelled; default: none, they are folders.")]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of --repo; default: its default branch.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Pipeline parameters, or STAGE.SETTING=VALUE.")
]
RunId = Annotated[str, typer.Argument(help="ID of a run, printed by submit.")]
Endpoint = Annotated[str, typer.Option(help="URL of KFP; default: KFP_ENDPOINT, KF_PIPELINES_ENDPOINT, or cluster.yaml's.")]
Images = Annotated[str, typer.Option(help="Unlabelled images on the cluster: path in --repo, folder or s3://.")]
Labelled = Annotated[
    str | None,
    typer.Option(
        help="Labelled set, located like --images: images/, labels/, classes.txt; default: none, the model is not evaluated."
    ),
]
Workspace = Annotated[str, typer.Option(help="Folder on a mounted volume where stages are reused and resumed; default: none.")]
RunsWorkspace = Annotated[
    str, typer.Option(help="Folder on a mounted volume with a folder per run, where killed runs resume; default: none.")
]
SettingsFile = Annotated[str, typer.Option(help="YAML file with settings in --repo, which the run reads; instead of --params.")]

pipeline = typer.Typer(cls=Group, help="Kubeflow pipeline: run it locally or on a cluster.", no_args_is_help=True)
schedule_group = typer.Typer(cls=Group, help="Run the pipeline on a schedule: create, list, delete.", no_args_is_help=True)
pipeline.add_typer(schedule_group, name="schedule")


@pipeline.command("submit")
def pipeline_submit(
    images: Images,
    labelled: Labelled = None,
    repo: Repo = "",
    revision: Revision = "",
    workspace: Workspace = "",
    params: Params = None,
    settings_file: SettingsFile = "",
    name: Annotated[str, typer.Option(help="Name of the run; default: name of the pipeline and the time.")] = "",
    cluster: Cluster = None,
    nodes: Nodes = 1,
    image: Image = "",
    endpoint: Endpoint = "",
    settings: Overrides = None,
) -> None:
    """Start a run on Kubeflow Pipelines, as a new version of the pipeline if it changed; print its URL."""
    from pixelclip_pipelines.parameters import arguments
    from pixelclip_pipelines.submit import Target, submit

    checked = arguments(images, labelled, workspace, params, parse_overrides(settings or []), repo, revision, settings_file)
    submit(checked, Target(endpoint, cluster, nodes, image), name)


@pipeline.command("status")
def pipeline_status(
    run_id: RunId,
    watch: Annotated[bool, typer.Option("--watch", help="Print changes until the run ends.")] = False,
    cluster: Cluster = None,
    endpoint: Endpoint = "",
) -> None:
    """Print a run's steps and states; exit code 0: succeeded, 1: failed or cancelled, 3: running."""
    from pixelclip_pipelines import runs
    from pixelclip_pipelines.submit import Target

    target = Target(endpoint, cluster)
    if watch:
        raise typer.Exit(runs.watch(target, run_id))
    status = runs.status(target, run_id)
    print("\n".join(status.lines))
    raise typer.Exit(status.exit_code)


@pipeline.command("logs")
def pipeline_logs(
    run_id: RunId,
    step: Annotated[str, typer.Argument(help="Step as in the lines of status: train, masks/2, ...")],
    cluster: Cluster = None,
    endpoint: Endpoint = "",
) -> None:
    """Print the logs of a step, of all its attempts."""
    from pixelclip_pipelines.runs import logs
    from pixelclip_pipelines.submit import Target

    for text in logs(Target(endpoint, cluster), run_id, step):
        print(text)


@pipeline.command("cancel")
def pipeline_cancel(run_id: RunId, cluster: Cluster = None, endpoint: Endpoint = "") -> None:
    """Terminate a run; its last step still closes the MLflow run."""
    from pixelclip_pipelines.runs import cancel
    from pixelclip_pipelines.submit import Target

    cancel(Target(endpoint, cluster), run_id)
    print(f"run {run_id} is being terminated")


@pipeline.command("doctor")
def pipeline_doctor(
    cluster: Cluster = None,
    nodes: Nodes = 1,
    image: Image = "",
    endpoint: Endpoint = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that the cluster has all that a run needs, through the kubeconfig; exit code 1 if something fails."""
    from pixelclip.commands.doctor import as_json, as_text
    from pixelclip_pipelines.cluster_doctor import run
    from pixelclip_pipelines.submit import Target

    findings = run(Target(endpoint, cluster, nodes, image))
    print(as_json(findings) if json else as_text(findings))
    raise typer.Exit(any(finding.state == "failed" for finding in findings))


@pipeline.command("run")
def pipeline_run(
    images: Annotated[str, typer.Option(help="Unlabelled images: folder, s3://, or path in --repo.")],
    out: Annotated[Path, typer.Option(callback=reject_s3, help="Workspace: finished stages are reused, others resume.")],
    labelled: Labelled = None,
    repo: Repo = "",
    revision: Revision = "",
    params: Params = None,
    runner: Annotated[str, typer.Option(help="subprocess, or docker (in image PIXELCLIP_IMAGE).")] = "subprocess",
    settings: Overrides = None,
) -> None:
    """Run the whole pipeline on this machine, without a cluster."""
    from pixelclip_pipelines.run import run_locally

    run_locally(images, labelled, out, params, parse_overrides(settings or []), repo, revision, runner)


@pipeline.command("compile")
def pipeline_compile(
    out: YamlOut = Path("pixelclip.yaml"),
    cluster: Cluster = None,
    nodes: Nodes = 1,
    image: Image = "",
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Without a labelled set: models are not evaluated.")] = False,
) -> None:
    """Write the pipeline as YAML for a cluster."""
    from pixelclip_pipelines.run import compile_to

    compile_to(out, cluster, nodes, image, not unlabelled)
    print(out)


@pipeline.command("compile-sweep")
def pipeline_compile_sweep(
    file: Sweep,
    out: YamlOut = Path("pixelclip-sweep.yaml"),
    params: Params = None,
    masks: Annotated[str, typer.Option(help="Shards with masks on the cluster: folder or s3://; needed for ranges.")] = "",
    labelled: Annotated[str, typer.Option(help="Labelled set on the cluster: folder or s3://; needed for ranges.")] = "",
    workspace: RunsWorkspace = "",
    cluster: Cluster = None,
    image: Image = "",
) -> None:
    """Write a sweep for a cluster: rows as one pipeline with parallel runs, ranges as an Experiment of Katib."""
    from pixelclip_pipelines.sweep import compile_to

    compile_to(file, out, params, workspace, cluster, image, masks, labelled)
    print(out)


@pipeline.command("submit-sweep")
def pipeline_submit_sweep(
    file: Sweep,
    masks: Annotated[str, typer.Option(help="Shards with masks on the cluster: folder or s3://.")],
    labelled: Annotated[str, typer.Option(help="Labelled set on the cluster: folder or s3://.")],
    params: Params = None,
    workspace: RunsWorkspace = "",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Also submit failed and cancelled runs again.")] = False,
    cluster: Cluster = None,
    image: Image = "",
    endpoint: Endpoint = "",
) -> None:
    """Start each row and seed of a sweep as a run of its own, or a search over ranges; again: only what is missing."""
    from pixelclip_pipelines.submit import Target
    from pixelclip_pipelines.sweep_run import submit

    submit(file, masks, labelled, Target(endpoint, cluster, 1, image), params, workspace, retry_failed)


@pipeline.command("compile-predict")
def pipeline_compile_predict(out: YamlOut = Path("pixelclip-predict.yaml"), cluster: Cluster = None, image: Image = "") -> None:
    """Write the pipeline that segments many images as YAML for a cluster."""
    from pixelclip_pipelines.predict import build
    from pixelclip_pipelines.run import write_yaml

    write_yaml(out, build, cluster, image)
    print(out)


@pipeline.command("submit-predict")
def pipeline_submit_predict(
    images: Annotated[str, typer.Option(help="Images or shards on the cluster: path in --repo, folder or s3://.")],
    classes: Annotated[
        str, typer.Option(help='"dog|puppy,grass,sky" (bar between synonyms), or a .txt file, one class per line.')
    ],
    model: Annotated[
        str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder on the cluster or s3://.")
    ] = "models:/pixelclip@champion",
    out: Annotated[
        str, typer.Option(help="s3://bucket/folder, {run} is replaced; default: in --workspace, or KFP's artifact store.")
    ] = "",
    repo: Annotated[str, typer.Option(help="DVC repository with --images; default: none, they are a folder or s3://.")] = "",
    revision: Revision = "",
    quality: Annotated[Quality, typer.Option(help="fast (one view) or best (refined, several times slower).")] = "fast",
    overlays: Annotated[bool, typer.Option(help="Also write the images in the colours of their classes.")] = True,
    label_studio: Annotated[bool, typer.Option("--label-studio", help="Also write tasks for Label Studio.")] = False,
    max_bad_share: Annotated[
        float, typer.Option(help="Maximum fraction of unreadable images.", min=0, max=1)
    ] = PredictConfig.model_fields["max_bad_share"].default,
    workspace: Workspace = "",
    name: Annotated[str, typer.Option(help="Name of the run or schedule; default: name of the pipeline and the time.")] = "",
    cron: Annotated[str, typer.Option(help="Run on a schedule, as in schedule create; --out and --workspace need {run}.")] = "",
    every: Annotated[str, typer.Option(help="Or an interval: 30m, 6h, 1d.")] = "",
    cluster: Cluster = None,
    image: Image = "",
    endpoint: Endpoint = "",
) -> None:
    """Segment many images on Kubeflow Pipelines, in parallel parts, with a registered model; print the run's URL."""
    from pixelclip_pipelines.predict import arguments
    from pixelclip_pipelines.submit import Target, submit_prediction

    settings = {"quality": quality, "overlays": overlays, "label_studio": label_studio, "max_bad_share": max_bad_share}
    checked = arguments(images, classes, model, out, workspace, repo, revision, **settings)
    submit_prediction(checked, Target(endpoint, cluster, 1, image), name, cron, every)


@schedule_group.command("create")
def schedule_create(
    name: Annotated[str, typer.Argument(help="Name of the schedule.")],
    images: Images,
    labelled: Labelled = None,
    cron: Annotated[
        str, typer.Option(help="'MINUTE HOUR DAY MONTH WEEKDAY' in KFP's time zone, for example '0 3 * * 1'.")
    ] = "",
    every: Annotated[str, typer.Option(help="Or an interval: 30m, 6h, 1d.")] = "",
    repo: Repo = "",
    revision: Revision = "",
    workspace: Workspace = "",
    params: Params = None,
    settings_file: SettingsFile = "",
    cluster: Cluster = None,
    nodes: Nodes = 1,
    image: Image = "",
    endpoint: Endpoint = "",
    settings: Overrides = None,
) -> None:
    """Run the pipeline on a schedule, one run at a time; missed runs are skipped."""
    from pixelclip_pipelines.parameters import arguments
    from pixelclip_pipelines.submit import Target, schedule

    checked = arguments(images, labelled, workspace, params, parse_overrides(settings or []), repo, revision, settings_file)
    schedule(checked, Target(endpoint, cluster, nodes, image), name, cron, every)


@schedule_group.command("list")
def schedule_list(cluster: Cluster = None, endpoint: Endpoint = "") -> None:
    """Print the schedules of the experiment."""
    from pixelclip_pipelines.submit import Target, schedules

    print("\n".join(schedules(Target(endpoint, cluster))) or "no schedules")


@schedule_group.command("delete")
def schedule_delete(
    schedule_id: Annotated[str, typer.Argument(help="ID of a schedule, printed by list.")],
    cluster: Cluster = None,
    endpoint: Endpoint = "",
) -> None:
    """Delete a schedule; its started runs continue."""
    from pixelclip_pipelines.submit import Target, unschedule

    unschedule(Target(endpoint, cluster), schedule_id)
    print(f"schedule {schedule_id} is deleted")
