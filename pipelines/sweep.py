"""A sweep as a pipeline: train -> evaluate for every row and seed in parallel, then one table and one plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from pixelclip.commands.sweep_file import Search, SweepRun, read, tagged
from pixelclip_components import IMAGE
from pixelclip_components.evaluate.component import evaluate
from pixelclip_components.fetch_data.component import fetch_data, fetch_labelled
from pixelclip_components.sweep_table.component import sweep_table
from pixelclip_components.train.component import train
from pixelclip_pipelines.cluster_config import Cluster, image_of, shared_folder
from pixelclip_pipelines.cluster_config import read as read_cluster
from pixelclip_pipelines.cluster_tasks import place_on, run_config
from pixelclip_pipelines.form import label
from pixelclip_pipelines.optimization import manifest, write
from pixelclip_pipelines.parameters import check_place, check_public, check_source

PARAMETERS = ("clip", "steps", "batch_size", "concepts", "seed")
"""Settings of `train` that are parameters of its component. `settings` contains all others."""


def build(cluster: Cluster | None = None, image: str = IMAGE) -> dsl.base_component.BaseComponent:
    """Build the sweep for a cluster, or for one machine if `cluster` is None.

    Args:
        cluster: resources of the steps' pods.
        image: container image of all steps.
    """

    def on(step: str, title: str, task: dsl.PipelineTask) -> dsl.PipelineTask:
        return place_on(task.set_display_name(title), cluster, step, image) if cluster else task

    @dsl.pipeline(
        name="pixelclip-sweep",
        description="Train and evaluate several settings, each with several seeds, and compare them in one table.",
        pipeline_config=run_config(cluster),
    )
    def sweep(masks: str, labelled: str, name: str = "sweep", runs: list = []):  # noqa: B006  (as in pixelclip.py)
        """Run every row with every seed.

        Args:
            masks: Shards with masks: a folder on a mounted volume or an s3:// prefix.
            labelled: Labelled set for evaluation: a folder on a mounted volume or an s3:// prefix. Never read in training.
            name: Title of the table and the plot.
            runs: Row, seed and settings of each run, written by `pixelclip pipeline compile-sweep` from a checked file.
        """

        pointer = {"repo": "", "revision": "", "settings": {}}  # KFP's importer rejects paths on a volume
        masked = on("fetch_data", "Find masks", fetch_data(path=masks, **pointer))
        truth = on("fetch_data", "Find labelled set", fetch_labelled(path=labelled, **pointer))
        with dsl.ParallelFor(runs, name="Runs") as run:
            # Without an MLflow run id, every row and seed gets its own run.
            everywhere = {"settings": run.settings, "workspace": run.workspace}
            chosen = {name: getattr(run, name) for name in PARAMETERS}
            model = on("train", "Train PixelCLIP", train(masks=masked.outputs["data"], **chosen, **everywhere)).outputs["model"]
            evaluation = evaluate(model=model, labelled=truth.outputs["labelled"], **everywhere)
            evaluated = on("evaluate", "Evaluate PixelCLIP", evaluation)
        table = sweep_table(name=name, runs=runs, metrics=dsl.Collected(evaluated.outputs["metrics"]))
        on("sweep_table", "Compare runs", table)

    return label(sweep)


sweep = build()
"""The sweep for one machine."""


def items(name: str, runs: Sequence[SweepRun], workspace: str = "") -> list[dict[str, Any]]:
    """Return the runs as items of the pipeline's loop, with their names and tags in MLflow.

    Args:
        name: name of the sweep.
        runs: from `pixelclip.commands.sweep_file.read`.
        workspace: folder that outlives the pipeline run, where stages are reused and resumed, or empty.
    """
    loop = []
    for run in runs:
        configured = tagged(run.train, name, run.row)
        item = {setting: getattr(configured, setting) for setting in PARAMETERS}
        changed = [("train", configured.model_dump(exclude_defaults=True, exclude=set(PARAMETERS)))]
        changed += [("evaluate", run.evaluate.model_dump(exclude_defaults=True))]
        settings = {f"{stage}.{setting}": value for stage, values in changed for setting, value in values.items()}
        folder = str(Path(workspace, run.folder)) if workspace else ""
        loop.append({**item, "row": run.row, "differs": run.settings, "settings": settings, "workspace": folder})
    return loop


def compile_to(
    file: Path,
    path: Path,
    params: Path | None = None,
    workspace: str = "",
    cluster: Path | None = None,
    image: str = "",
    masks: str = "",
    labelled: str = "",
) -> None:
    """Compile a sweep for a cluster: rows to a pipeline, ranges to an Experiment of Katib.

    Args:
        file: the sweep, checked before anything is written; see `pixelclip.commands.sweep_file.read`.
        path: YAML file to write. The runs are the default of the pipeline's parameter `runs`.
        params: YAML with one section per stage; the file's own settings override it.
        workspace: see `items`; required for ranges.
        cluster: settings of the cluster; see `cluster_config.read`.
        image: container image; overrides PIXELCLIP_IMAGE and the cluster's.
        masks, labelled: see the pipeline's parameters, of which they are the defaults; required for ranges.

    Raises:
        ValueError: an invalid sweep, a URL with credentials, an invalid cluster or workspace, or `path` is not a YAML file.
    """
    name, runs = read(file, params)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: the compiled pipeline must be a .yaml file")
    if path.resolve() == file.resolve():
        raise ValueError(f"{path}: the compiled pipeline would overwrite the sweep")
    config = read_cluster(cluster)
    if isinstance(runs, Search):
        write(path, manifest(name, runs, masks, labelled, workspace, config, image))
        return
    for run in runs:
        check_public({"train": run.train, "evaluate": run.evaluate})
    check_place(workspace, shared_folder(config))
    data = {option: place for option, place in {"masks": masks, "labelled": labelled}.items() if place}
    for option, place in data.items():
        check_source(option, place)
    parameters = {"name": name, "runs": items(name, runs, workspace), **data}
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(build(config, image_of(config, image)), str(path), pipeline_parameters=parameters)
