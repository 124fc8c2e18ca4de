"""One run of a sweep as a pipeline, and the command that starts every row and seed as a run of its own."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kfp
from kfp import dsl

from pixelclip.commands.sweep_file import Search, SweepRun, read
from pixelclip.config import lasting
from pixelclip_components import IMAGE
from pixelclip_components.evaluate.component import evaluate
from pixelclip_components.fetch_data.component import fetch_data, fetch_labelled
from pixelclip_components.finish.component import finish
from pixelclip_components.train.component import train
from pixelclip_pipelines import optimization
from pixelclip_pipelines.cluster_config import Cluster, image_of, shared_folder
from pixelclip_pipelines.cluster_config import read as read_cluster
from pixelclip_pipelines.cluster_tasks import place_on, run_config, set_run_id
from pixelclip_pipelines.form import label
from pixelclip_pipelines.parameters import as_text, check_batch, check_place, check_public, check_source
from pixelclip_pipelines.runs import EXIT_CODES
from pixelclip_pipelines.submit import Target, all_runs, uploaded
from pixelclip_pipelines.sweep import PARAMETERS, items

_NAME = 120  # characters of a run's name


def build(cluster: Cluster, image: str = IMAGE) -> dsl.base_component.BaseComponent:
    """Build the pipeline for a cluster.

    Args:
        cluster: resources of the steps' pods.
        image: container image of all steps.
    """

    def on(step: str, title: str, task: dsl.PipelineTask) -> dsl.PipelineTask:
        return set_run_id(place_on(task.set_display_name(title), cluster, step, image))

    @dsl.pipeline(
        name="pixelclip-sweep-run",
        description="Train and evaluate one row of a sweep with one seed.",
        pipeline_config=run_config(cluster),
    )
    def sweep_run(
        masks: str,
        labelled: str,
        row: str,
        differs: str,
        clip: str,
        steps: int,
        batch_size: int,
        concepts: int,
        seed: int,
        settings: dict,
        workspace: str = "",
    ):
        """Train and evaluate.

        Args:
            masks: Shards with masks: a folder on a mounted volume or an s3:// prefix.
            labelled: Labelled set for evaluation: a folder on a mounted volume or an s3:// prefix. Never read in training.
            row: Name of the row; only shown.
            differs: Settings of the row; only shown.
            clip: CLIP to start from.
            steps: Optimizer steps.
            batch_size: Images in one optimizer step.
            concepts: Number of learnable concepts (K).
            seed: Seed of prompts, decoder, sample order and views.
            settings: All other settings that differ from their defaults.
            workspace: Folder on a mounted volume where stages are reused and resumed; if empty, the run's own artifact store.
        """
        pointer = {"repo": "", "revision": "", "settings": {}}  # KFP's importer rejects paths on a volume
        everywhere = {"settings": settings, "workspace": workspace}
        chosen = {"clip": clip, "steps": steps, "batch_size": batch_size, "concepts": concepts, "seed": seed}
        with dsl.ExitHandler(on("finish", "Close the MLflow run", finish(nodes=1)), name="sweep"):
            masked = on("fetch_data", "Find masks", fetch_data(path=masks, **pointer)).outputs["data"]
            truth = on("fetch_data", "Find labelled set", fetch_labelled(path=labelled, **pointer)).outputs["labelled"]
            model = on("train", "Train PixelCLIP", train(masks=masked, **chosen, **everywhere)).outputs["model"]
            on("evaluate", "Evaluate PixelCLIP", evaluate(model=model, labelled=truth, **everywhere))

    return label(sweep_run)


def submit(
    file: Path,
    masks: str,
    labelled: str,
    target: Target,
    params: Path | None = None,
    workspace: str = "",
    retry_failed: bool = False,
) -> None:
    """Start a run for every row and seed of a sweep that has none, and print the state of the others.

    A run is found in the experiment of the cluster by its name, which has row, seed and a fingerprint of inputs and settings.
    Ranges become one Experiment of Katib instead, see `optimization.manifest`.

    Args:
        file: rows of settings, see `pixelclip.commands.sweep_file.read`.
        masks, labelled: see the pipeline's parameters.
        target: KFP and how to compile for it; `nodes` is not used.
        params: YAML with one section per stage; the file's own settings override it.
        workspace: folder on the shared volume, with a folder per run, or empty.
        retry_failed: also start runs that failed or were cancelled again.

    Raises:
        ValueError: an invalid sweep or workspace, a URL with credentials; KFP, for ranges Kubernetes, is unreachable or rejects
            a request.
    """
    cluster = read_cluster(target.cluster)
    name, runs = read(file, params)
    if isinstance(runs, Search):
        if retry_failed:
            raise ValueError(f"--retry-failed: {file} has ranges, whose trials Katib starts")
        experiment = optimization.manifest(name, runs, masks, labelled, workspace, cluster, target.image)
        print("\n".join(optimization.submit(experiment, cluster)), flush=True)
        return
    arguments = {
        _title(name, run, masks, labelled): _arguments(item, masks, labelled)
        for run, item in zip(runs, items(name, runs, workspace), strict=True)
    }
    _check(runs, cluster, masks, labelled, workspace)
    pipeline = build(cluster, image_of(cluster, target.image))
    submitted = failed = 0
    with uploaded(pipeline, cluster, {}, target) as (client, page, options):
        existing = _existing(client, options["experiment_id"], cluster.namespace)
        for title, values in arguments.items():
            run_id, state = existing.get(title, ("", ""))
            has_failed = EXIT_CODES.get(state) == 1
            if run_id and not (has_failed and retry_failed):
                failed += has_failed
                print(f"{state:<10} {title}: {page}/#/runs/details/{run_id}", flush=True)
                continue
            client.run_pipeline(job_name=title, **{**options, "params": values})  # prints its URL
            print(f"{'submitted':<10} {title}", flush=True)
            submitted += 1
    print(f"{submitted} of {len(arguments)} runs submitted", flush=True)
    if failed:
        print(f"{failed} failed earlier; --retry-failed submits them again", flush=True)


def _check(runs: list[SweepRun], cluster: Cluster, masks: str, labelled: str, workspace: str) -> None:
    for option, place in {"masks": masks, "labelled": labelled}.items():
        check_source(option, place)
    check_place(workspace, shared_folder(cluster))
    for run in runs:
        check_public({"train": run.train, "evaluate": run.evaluate})
        check_batch(run.train, 1, cluster.steps["train"].gpus)


def _title(name: str, run: SweepRun, masks: str, labelled: str) -> str:
    """Return the name of a run: sweep, row, seed, and what identifies its result. Long names of rows are cut."""
    identity = [masks, labelled, lasting(run.train), lasting(run.evaluate)]
    end = f", seed {run.seed} ({hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]})"
    return " ".join(f"{name}: {run.row}".split())[: _NAME - len(end)] + end


def _arguments(item: Mapping[str, Any], masks: str, labelled: str) -> dict[str, Any]:
    kept = {name: item[name] for name in (*PARAMETERS, "row", "settings", "workspace")}
    return {"masks": masks, "labelled": labelled, "differs": as_text(item["differs"]), **kept}


def _existing(client: kfp.Client, experiment: str, namespace: str) -> dict[str, tuple[str, str]]:
    """Return ID and state of the experiment's runs by name; of several runs with one name, of one that did not fail."""
    found: dict[str, tuple[str, str]] = {}
    for run in all_runs(client, experiment, namespace):
        if EXIT_CODES.get(found.get(run.display_name, ("", "FAILED"))[1]) == 1:
            found[run.display_name] = (run.run_id, run.state or "PENDING")
    return found
