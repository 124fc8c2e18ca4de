"""A sweep as a pipeline: train -> evaluate for every row and seed side by side, then one table and one plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from pixelclip.config import EvaluateConfig, TrainConfig
from pixelclip.sweep import Planned, read
from pixelclip_components import IMAGE
from pixelclip_components.evaluate.component import evaluate
from pixelclip_components.fetch_data.component import fetch_data
from pixelclip_components.sweep_table.component import sweep_table
from pixelclip_components.train.component import train
from pixelclip_pipelines.cluster_config import Cluster, check_workspace, image_of
from pixelclip_pipelines.cluster_config import read as read_cluster
from pixelclip_pipelines.cluster_tasks import place_on
from pixelclip_pipelines.pixelclip import SETTING_OF


def build(cluster: Cluster | None = None, image: str = IMAGE) -> dsl.base_component.BaseComponent:
    """The sweep for a cluster, or, without one, as it runs on one machine.

    Args:
        cluster: what each step's pod gets.
        image: container image of all steps.
    """

    def on(step: str, task: dsl.PipelineTask) -> dsl.PipelineTask:
        return place_on(task, cluster, step, image) if cluster else task

    @dsl.pipeline(name="pixelclip-sweep", description="Settings, each trained and evaluated at several seeds, in one table.")
    def sweep(masks: str, labelled: str, name: str = "sweep", runs: list = []):  # noqa: B006  (as in pixelclip.py)
        """Runs every row at every seed.

        Args:
            masks: Shards with masks, a folder on a mounted volume or an s3:// prefix.
            labelled: Labelled set to evaluate on, a folder on a mounted volume or an s3:// prefix. Never read in training.
            name: Title of the table and the plot.
            runs: What is run, as `pixelclip pipeline compile-sweep` wrote it from a checked file: row, seed, settings of each.
        """

        def pointed(path: str) -> dsl.PipelineTask:  # KFP's importer takes no path of a volume
            return on("fetch_data", fetch_data(repo="", path=path, revision="", settings={}))

        masked, truth = pointed(masks), pointed(labelled)
        with dsl.ParallelFor(runs, name="runs") as run:
            # No run of MLflow is named here: every row at every seed has one of its own.
            everywhere = {"settings": run.settings, "workspace": run.workspace}
            trained = train(
                masks=masked.outputs["data"],
                clip=run.clip,
                steps=run.steps,
                batch_size=run.batch_size,
                concepts=run.concepts,
                seed=run.seed,
                **everywhere,
            )
            made = on("train", trained).outputs["model"]
            evaluated = on("evaluate", evaluate(model=made, labelled=truth.outputs["data"], **everywhere))
        on("sweep_table", sweep_table(name=name, runs=runs, metrics=dsl.Collected(evaluated.outputs["metrics"])))

    return sweep


sweep = build()
"""As it runs on one machine."""


def items(planned: Sequence[Planned], workspace: str = "") -> list[dict[str, Any]]:
    """The runs as items of the pipeline's loop.

    Args:
        planned: the runs, see `pixelclip.sweep.read`.
        workspace: a folder that outlives the pipeline's run, where stages are reused and resumed; empty for none.
    """
    defaults = _values(TrainConfig(), EvaluateConfig())
    found = []
    for each in planned:
        values = _values(each.train, each.evaluate)
        named = {name: values[setting] for name, setting in SETTING_OF.items() if setting in values}
        others = {key: v for key, v in values.items() if key not in SETTING_OF.values() and v != defaults[key]}
        place = str(Path(workspace, each.place)) if workspace else ""
        found.append({**named, "row": each.row, "differs": each.settings, "settings": others, "workspace": place})
    return found


def _values(train_config: TrainConfig, evaluate_config: EvaluateConfig) -> dict[str, Any]:
    sections = {"train": train_config, "evaluate": evaluate_config}
    return {f"{stage}.{name}": value for stage, config in sections.items() for name, value in config.model_dump().items()}


def compile_to(
    file: Path, path: Path, params: Path | None = None, workspace: str = "", cluster: Path | None = None, image: str = ""
) -> None:
    """Writes a sweep as a pipeline for a cluster; its runs are the default of parameter `runs`.

    Args:
        file: the sweep, checked before anything is written; see `pixelclip.sweep.read`.
        path: YAML file to write.
        params: YAML with one section a stage, below the file's own settings.
        workspace: see `items`.
        cluster: settings of the cluster; see `cluster_config.read`.
        image: container image, before PIXELCLIP_IMAGE and that of the cluster.

    Raises:
        ValueError: an unusable sweep, cluster or workspace, or `path` is no YAML file.
    """
    name, planned = read(file, params)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: the compiled pipeline is a .yaml file")
    if path.resolve() == file.resolve():
        raise ValueError(f"{path}: would overwrite the sweep")
    there = read_cluster(cluster)
    check_workspace(there, workspace)
    built = build(there, image_of(there, image))
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(built, str(path), pipeline_parameters={"name": name, "runs": items(planned, workspace)})
