"""Helpers of the component bodies: pinned versions, fetched data, processes, pages for KFP.

Common arguments: `repo` is the URL or path of a DVC repository (if empty, data are folders or s3:// prefixes), `workspace` is a
folder that outlives the run (or empty), and `settings` contains the settings of all stages as `stage.setting`.

Running steps import this module, so it must not import kfp.
"""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from pixelclip import __version__
from pixelclip.api import model_path
from pixelclip.config import TrainConfig
from pixelclip.data.class_names import SHIPPED
from pixelclip.settings import load
from pixelclip.storage.download import check_exists, local_path
from pixelclip.storage.files import read_json, write_atomically, write_json
from pixelclip.workflow.code_version import CHANGED, UNKNOWN, code_revision
from pixelclip.workflow.failures import FAILURE_FILE
from pixelclip.workflow.provenance import origins, read_provenance, source
from pixelclip.workflow.stage import PROVENANCE, Metrics, describe, read_metrics
from pixelclip_pipelines.artifacts import located, pack, place, point, record, writable
from pixelclip_pipelines.supervisor import RETRIES

_TRAINING_SETTINGS_OF_CLIP = ("train.side", "train.residual")
_WATCH_SECONDS = 0.1
_DATA_COLUMNS = "| data | md5 | revision | path |\n|---|---|---|---|\n"


def pinned(repo: str, revision: str, workspace: str) -> tuple[str, str]:
    """Resolve a branch, tag or commit (by default the default branch) to a full SHA, so the whole run reads one commit.

    Returns:
        The full SHA, empty without a repository, and the cache key of a fetch.

    Raises:
        ValueError: no such repository or revision, or the workspace is not writable.
    """
    if workspace:
        writable(workspace)  # fail now, not hours later
    if not repo:
        # KFP caches a fetch by its parameters, but unversioned data may change without a new path.
        return "", _unique()
    from pixelclip.fetch_data import commit_of

    commit = commit_of(repo, revision or "HEAD")
    # KFP does not check whether a workspace still contains the fetched data. The stage does.
    return commit, _unique() if workspace else commit


def pinned_clip(clip: str, settings: Mapping[str, Any], workspace: str) -> tuple[str, dict[str, Any]]:
    """Return the cache-key parameters of the step that evaluates the CLIP `train.clip`.

    Returns:
        Version of the CLIP's weights and of the code, and the settings that the evaluation reads, so that other training
        settings do not repeat it.
    """
    from pixelclip.models.clip_sources import clip_version

    chosen = {key: value for key, value in settings.items() if key.startswith("evaluate.") or key in _TRAINING_SETTINGS_OF_CLIP}
    revision = code_revision()
    version = f"{clip_version(str(settings.get('evaluate.clip') or clip))} code {__version__} {revision}"
    # KFP does not check the content of a workspace, a folder of masks or a file of names, and the revision does not identify
    # uncommitted code.
    # The key is unique then, and the stage itself checks what can be reused.
    unversioned = revision == UNKNOWN or revision.endswith(CHANGED)
    folder = settings.get("evaluate.masks_folder") or settings.get("evaluate.names", SHIPPED[0]) not in SHIPPED
    return f"{version} {_unique()}" if workspace or folder or unversioned else version, chosen


def _unique() -> str:
    return f"unpinned-{uuid.uuid4()}"


def fetched(artifact: Any, repo: str, path: str, revision: str, settings: Mapping[str, Any], workspace: str) -> str:
    """Fetch `path` from a DVC repository at the commit of `pinned`; without a repository, point to existing data.

    The metadata of `artifact` describe the data.

    Returns:
        The version of the data: path and MD5, or a unique value for unversioned data.
    """
    if not repo:
        check_exists(path)
        if Path(path).is_dir() and not any(Path(path).iterdir()):
            raise ValueError(f"{path}: the folder is empty")
        point(artifact, path)
        return _unique()
    from pixelclip.fetch_data import about, run

    out = place(artifact, workspace, f"fetch_data/{path.strip('/').replace('/', '-')}/{Path(path).name}")
    config = load("fetch_data", overrides={**settings, "fetch_data.path": path, "fetch_data.revision": revision or "HEAD"})
    record(artifact, run(repo, out, config))
    artifact.metadata.update(about(out))
    pack(artifact)
    return f"{path} md5 {artifact.metadata['md5']}"


def fetched_model(artifact: Any, name: str) -> None:
    """Copy a model folder, `s3://` prefix or registered model to an output artifact; its MD5 goes into the metadata."""
    model = model_path(name)
    shutil.copytree(model, artifact.path, dirs_exist_ok=True)  # an interrupted attempt leaves a part of it
    artifact.metadata.update(name=name, md5=describe(model)["md5"])
    print(f"fetch_model: {name} has MD5 {artifact.metadata['md5']}", flush=True)


@contextmanager
def gathered(whole: Any, parts: Sequence[Any] | None) -> Iterator[Path | str]:
    """Yield the output of a stage as one folder: the artifact `whole`, or links to the artifacts `parts` of several steps."""
    if not parts:
        yield located(whole)
        return
    with tempfile.TemporaryDirectory(prefix="parts-") as folder:
        for number, part in enumerate(parts):
            Path(folder, f"{number:04d}").symlink_to(Path(located(part)).absolute())
        yield Path(folder)


def processes(device: str) -> int:
    """Return the number of training processes: one per GPU of the pod, at least one.

    Raises the errors of `distributed.count_gpus`.
    """
    from pixelclip.distributed import count_gpus

    return max(1, count_gpus()) if device in ("auto", "cuda") else 1


def train_by(number: int, masks: Path | str, out: Path, config: TrainConfig) -> Metrics:
    """Run `train.run` in `number` processes started by torchrun; a single one without retries in this process.

    Torchrun restarts all processes if one fails, up to PIXELCLIP_RETRIES times, and the training continues after its last
    checkpoint. It does not after bad input, nor after a network fault: then the whole step is repeated, see `supervisor`.

    Raises:
        SystemExit: a process failed after printing the reason; carries its exit code.
    """
    restarts = int(os.environ.get(RETRIES, "0"))
    if number == 1 and not restarts:
        from pixelclip.train import run

        return run(masks, out, config)
    with tempfile.TemporaryDirectory() as folder:
        params, failure = Path(folder, "params.yaml"), Path(folder, "failure")
        params.write_text(yaml.safe_dump({"train": config.model_dump()}))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += [f"--nproc-per-node={number}", f"--max-restarts={restarts}"]
        options = ["--masks", str(masks), "--out", str(out), "--params", str(params)]
        command = [*torchrun, "-m", "pixelclip_pipelines.worker", "train", *options]
        if code := _watch(command, failure):
            raise SystemExit(code)
    return read_metrics(out)


def _watch(command: Sequence[str], failure: Path) -> int:
    """Run torchrun, pass SIGTERM on, and stop it if a process writes `failure`, since torchrun restarts after every error.

    Returns:
        The exit code: that of `failure`, or torchrun's, which is 128 plus the signal if it was killed.
    """
    # Restarted processes would find the addresses of their predecessors in the agent's store and wait for them forever.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", FAILURE_FILE: str(failure)}
    with subprocess.Popen(command, env=os.environ | environment) as process:
        previous = signal.signal(signal.SIGTERM, lambda number, _frame: process.send_signal(number))
        try:
            while (code := process.poll()) is None:
                if failure.is_file():
                    process.terminate()
                    process.wait()
                else:
                    time.sleep(_WATCH_SECONDS)
        finally:
            signal.signal(signal.SIGTERM, previous)
    if failure.is_file():
        return int(failure.read_text().partition(" ")[0])
    return 128 - code if code < 0 else code


def links(registration: Path, result: Path) -> str:
    """Return a registration as Markdown: MLflow run, registered version, and the versions of the data of `result`.

    Args:
        registration: output of `register`.
        result: the evaluation, or the model if it was not evaluated.
    """
    from pixelclip.registry.model_version import markdown, read_registration
    from pixelclip.tracking.pages import version_page
    from pixelclip.tracking.server import ui_address

    registered = read_registration(registration)
    lines = [markdown(registration)]
    if ui := ui_address(registered["tracking_uri"]):
        address = version_page(ui, registered["name"], registered["version"])
        lines.append(f"[{registered['name']} version {registered['version']} in the registry]({address})\n")
    rows = {
        name: f"| {name} | `{described['md5']}` | {source(described).get('git_sha', '–')} | {described['path']} |"
        for name, described, _ in origins(read_provenance(result / PROVENANCE))
    }
    return "\n".join([*lines, _DATA_COLUMNS + "\n".join(rows.values()) + "\n"])


def compared(evaluated: Metrics, model: Path | str) -> Metrics:
    """Return the metrics by which people compare runs: those of the evaluation, and of the model's training."""
    return {**evaluated, **read_metrics(local_path(model))}


def show_metrics(artifact: Any, values: Metrics) -> None:
    """Log metrics to KFP, and write them as a JSON file, which KFP previews."""
    for name, value in values.items():
        artifact.log_metric(name, value)
    write_json(Path(artifact.path), values)


class _Matrix(BaseModel):
    classes: list[str]
    counts: list[list[int]]


def show_confusion(artifact: Any, evaluation: Path) -> None:
    """Log the confusion matrix of the most frequent classes to KFP, and write it as CSV, which KFP previews.

    The header of the CSV has the predicted classes, and each row the pixels of one true class. Without a matrix in the
    evaluation, the file has only the header's first cell.
    """
    from pixelclip.evaluate import CONFUSION

    matrix = read_json(evaluation / CONFUSION, _Matrix) if (evaluation / CONFUSION).is_file() else {"classes": [], "counts": []}
    if matrix["classes"]:
        artifact.log_confusion_matrix(matrix["classes"], matrix["counts"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["truth \\ prediction", *matrix["classes"]])
    writer.writerows([name, *row] for name, row in zip(matrix["classes"], matrix["counts"], strict=True))
    write_atomically(Path(artifact.path), text.getvalue())
