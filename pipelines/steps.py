"""What the bodies of the components do besides calling their stage: find inputs, start processes, close the run, show."""

import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pixelclip import __version__
from pixelclip.config import TrainConfig, load
from pixelclip.stage import CHANGED, METRICS, PROVENANCE, UNKNOWN, Metrics, code_revision
from pixelclip.storage import read_json
from pixelclip_pipelines.artifacts import located, place, point, writable

_OF_TRAINING = ("train.side", "train.residual")
"""Settings of the training that an evaluation of CLIP shares."""
_STATUS = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELLED": "KILLED"}
_DATA_COLUMNS = "| data | md5 | revision | path |\n|---|---|---|---|\n"


def pinned(repo: str, revision: str, workspace: str) -> tuple[str, str]:
    """The commit that a revision of a DVC repository is now, so that all of a run reads one commit.

    Args:
        repo: URL or path of the repository; empty where data are no DVC data.
        revision: a branch, a tag or a commit; empty: the repository's default branch.
        workspace: a folder that outlives the run, or empty.

    Returns:
        Its full SHA, or nothing without a repository; and by which word KFP may know a fetch again.

    Raises:
        ValueError: no such repository or revision, or a workspace in which no step could write.
    """
    if workspace:
        writable(workspace)  # said now, not hours later
    if not repo:
        # KFP takes a fetch of known parameters from its cache, with the version that it told then. Of data that nobody
        # versions that would be a lie once they change, so their fetches must have a parameter that no other run has.
        return "", _unique()
    from pixelclip.fetch_data import commit_of

    commit = commit_of(repo, revision or "HEAD")
    # KFP does not look whether a workspace still holds what was fetched into it. The stage does.
    return commit, _unique() if workspace else commit


def pinned_clip(clip: str, settings: Mapping[str, Any], workspace: str) -> tuple[str, dict[str, Any]]:
    """By which parameters KFP may know an evaluation of CLIP again.

    Args:
        clip: setting `train.clip`.
        settings: settings of all stages.
        workspace: a folder that outlives the run, or empty.

    Returns:
        What identifies the CLIP's weights and the code that measures it; and of the settings those that the evaluation
        goes by, so that a training with others does not repeat it.
    """
    from pixelclip.sources import clip_version

    chosen = {key: value for key, value in settings.items() if key.startswith("evaluate.") or key in _OF_TRAINING}
    revision = code_revision()
    version = f"{clip_version(str(settings.get('evaluate.clip') or clip))} code {__version__} {revision}"
    # What KFP remembers of a workspace is a path, and it does not look whether anything stands there still; of given masks
    # it would know no more. The stage looks at both. Of changes that nobody committed a revision says nothing.
    unversioned = revision == UNKNOWN or revision.endswith(CHANGED)
    return f"{version} {_unique()}" if workspace or settings.get("evaluate.masks_folder") or unversioned else version, chosen


def _unique() -> str:
    return f"unpinned-{uuid.uuid4()}"


def fetched(
    artifact: Any, repo: str, path: str, revision: str, settings: Mapping[str, Any], workspace: str
) -> tuple[Metrics, str]:
    """Fetches data out of a DVC repository, or, without one, points to data that are there already.

    Args:
        artifact: the output artifact; its metadata tell what it is.
        repo: URL or path of the DVC repository; empty: `path` is a folder or an s3:// prefix itself.
        path: of the data in the repository.
        revision: the commit that `pinned` said.
        settings: settings of all stages.
        workspace: a folder that outlives the run, or empty.

    Returns:
        Metrics, and the data's version: path and md5, or a word that no other run gets for data that have no version.
    """
    if not repo:
        point(artifact, path)
        return {}, _unique()
    from pixelclip.fetch_data import about, run

    out = place(artifact, workspace, f"fetch_data/{path.strip('/').replace('/', '-')}/{Path(path).name}")
    metrics = run(
        repo, out, load("fetch_data", overrides={**settings, "fetch_data.path": path, "fetch_data.revision": revision})
    )
    artifact.metadata.update(about(out))
    return metrics, f"{path} md5 {artifact.metadata['md5']}"


@contextmanager
def gathered(masks: Any, parts: Sequence[Any] | None) -> Iterator[Path | str]:
    """The masks as one folder: what one step made, or links to all parts that several made.

    Args:
        masks: an artifact, or None.
        parts: artifacts, one of each part, or None.
    """
    if not parts:
        yield located(masks)
        return
    with tempfile.TemporaryDirectory(prefix="masks-") as folder:
        for number, part in enumerate(parts):
            Path(folder, f"{number:04d}").symlink_to(Path(located(part)).absolute())
        yield Path(folder)


def processes(device: str) -> int:
    """How many processes a step starts here: one a GPU of the pod, or one; raises ValueError as `ranks.count_gpus`."""
    from pixelclip.ranks import count_gpus

    return max(1, count_gpus()) if device in ("auto", "cuda") else 1


def train_by(number: int, masks: Path | str, out: Path, config: TrainConfig) -> Metrics:
    """Trains in this process, or in several that torchrun starts.

    Args:
        number: of processes.
        masks: Shards with masks.
        out: model folder to make.
        config: settings.

    Raises:
        SystemExit: a process failed, with its exit code; it has said why.
    """
    if number == 1:
        from pixelclip.train import run

        return run(masks, out, config)
    with tempfile.TemporaryDirectory() as folder:
        params = Path(folder, "params.yaml")
        params.write_text(yaml.safe_dump({"train": config.model_dump()}))
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "-m", "pixelclip", "train"]
        given = ["--masks", str(masks), "--out", str(out), "--params", str(params)]
        done = subprocess.run([sys.executable, *words, *given])
    if done.returncode:
        raise SystemExit(done.returncode)
    return dict(read_json(out / METRICS))


def close_run(state: str) -> None:
    """Ends the MLflow run of this pipeline run with the status that the pipeline's steps had.

    Args:
        state: of the steps, as KFP says it.

    Raises:
        ValueError: the id of the pipeline run is unknown, or MLflow cannot be reached.
    """
    from pixelclip.server import connect, experiment_id
    from pixelclip.tracking import PIPELINE_RUN

    if given := os.environ.get("MLFLOW_RUN_ID"):
        print(f"finish: MLflow run {given} was not started here, and who started it closes it", flush=True)
        return
    pipeline_run = os.environ.get(PIPELINE_RUN)
    if not pipeline_run:
        raise ValueError(f"{PIPELINE_RUN} must hold the id of the pipeline run whose MLflow run is to be closed")
    client = connect()
    found = client.search_runs([experiment_id(client)], f"tags.`kfp.run_id` = '{pipeline_run}'")
    if not found:
        print(f"finish: pipeline run {pipeline_run} ({state}) has started no training, so there is no run to close", flush=True)
    for run in found:
        # KFP before 2.17 calls steps with a loop among them RUNNING for ever (kubeflow/pipelines#13321); the last step
        # tells how they ended.
        registered = client.search_model_versions(f"run_id = '{run.info.run_id}'")
        status = _STATUS.get(state) or ("FINISHED" if registered else "FAILED")
        client.set_terminated(run.info.run_id, status)
        print(f"finish: MLflow run {run.info.run_id} is {status} (the pipeline's steps: {state})", flush=True)


def links(registration: Path, evaluation: Path) -> str:
    """The page of a registration: MLflow run, version in the registry, and every version of data that led to it.

    Args:
        registration: what `register` wrote.
        evaluation: what `evaluate` wrote about the model.
    """
    from pixelclip.register import REGISTRATION, markdown

    there = read_json(registration / REGISTRATION)
    lines = [markdown(registration)]
    if there["tracking_uri"].startswith("http"):
        address = f"{there['tracking_uri'].rstrip('/')}/#/models/{there['name']}/versions/{there['version']}"
        lines.append(f"[{there['name']} version {there['version']} in the registry]({address})\n")
    rows = dict(_data(read_json(evaluation / PROVENANCE)))
    return "\n".join([*lines, _DATA_COLUMNS + "\n".join(rows.values()) + "\n"])


def _data(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """One line of a Markdown table for every input of a stage and of all stages before it."""
    for name, described in provenance["inputs"].items():
        made_by = described.get("provenance", {})
        if made_by.get("stage") in (None, "fetch_data"):  # the others are results of this pipeline
            revision = made_by.get("source", {}).get("git_sha", "")
            yield name, f"| {name} | `{described.get('md5', '')}` | {revision or '–'} | {described.get('path', '')} |"
        else:
            yield from _data(made_by)


def show_confusion(artifact: Any, evaluation: Path) -> None:
    """Puts the confusion of the most frequent classes on the KFP page; an evaluation of before there was one has none."""
    from pixelclip.evaluate import CONFUSION

    if (evaluation / CONFUSION).is_file():
        found = read_json(evaluation / CONFUSION)
        artifact.log_confusion_matrix(found["classes"], found["counts"])
