"""What MLflow's pages show about a run: its name, source, user and tags, and the metrics of an evaluation in groups."""

import getpass
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from mlflow.entities import SourceType
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_RUN_NOTE, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_USER

from pixelclip.workflow.code_version import CHANGED, UNKNOWN
from pixelclip.workflow.provenance import chain, flatten, origins, source

NOTE = MLFLOW_RUN_NOTE
"""Tag with the description of a run or an experiment, in Markdown."""
EXPERIMENT = {
    "mlflow.experimentKind": "custom_model_development",
    NOTE: (
        "Trainings of PixelCLIP, open-vocabulary segmentation without class labels. Every run is one model. Its description "
        "is the model card; its artifact `report.html` shows the evaluation.\n\nTo compare runs, select them and open "
        "*Compare* or the chart view: `eval/NAME/miou` (percent) and `eval/NAME/gain` (points over CLIP) show which is better, "
        "`eval/NAME/iou/CLASS` and the images on what, and the parameters why."
    ),
}
"""Tags of a new experiment."""
_GENERIC = ("images", "data", "JPEGImages", "train", "")
_NAME_LENGTH = 60


def run_name(provenance: Mapping[str, Any]) -> str:
    """Return the name of a training run from what may differ between runs: data, masks, CLIP, steps, and a short id.

    The id is the start of the stage's fingerprint: two runs share it if settings, inputs and version are the same.
    """
    settings = flatten(provenance)
    masks = "dino" if settings.get("train.dino") else settings.get("masks.generator", "")
    clip = PurePosixPath(str(settings.get("train.clip", ""))).name
    steps = f"{settings['train.steps']} steps" if "train.steps" in settings else ""
    parts = (_data_name(provenance), masks, clip, steps, str(provenance.get("fingerprint", ""))[:6])
    return ", ".join(str(part)[:_NAME_LENGTH] for part in parts if part) or str(provenance["stage"])


def _data_name(provenance: Mapping[str, Any]) -> str:
    data = [described for name, described, _ in origins(provenance) if name in ("images", "shards", "masks")]
    if not data:
        return ""
    fetched = source(data[-1])
    path = PurePosixPath(str(fetched.get("path") or data[-1]["path"]))
    names = [part for part in path.parts if part not in _GENERIC]
    name = names[-1] if names else path.name
    return f"{name}@{fetched['git_sha'][:7]}" if fetched.get("git_sha") else name


def run_tags(provenance: Mapping[str, Any], lineage: Mapping[str, str]) -> dict[str, str]:
    """Return the tags of a training run: MLflow's source and user, and of `lineage` those of the code and of the first data.

    The complete lineage is an artifact of the run.
    """
    first = {name for name, _, _ in origins(provenance)}
    kept = {f"data.{name}.{key}" for name in first for key in ("md5", "git_sha", "repo")}
    chosen = {key: value for key, value in lineage.items() if not key.startswith("data.") or key in kept}
    revision = lineage["code.revision"].removesuffix(CHANGED)
    chosen |= {} if revision == UNKNOWN else {MLFLOW_GIT_COMMIT: revision}
    kind = SourceType.JOB if "kfp.run_id" in lineage else SourceType.LOCAL
    chosen |= {MLFLOW_SOURCE_NAME: f"pixelclip {provenance['stage']}", MLFLOW_SOURCE_TYPE: SourceType.to_string(kind)}
    return chosen | ({MLFLOW_USER: user} if (user := _user()) else {})


def _user() -> str:
    """Return the user at the tracking server, or else of this machine; empty for a container's UID without a name."""
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return user
    with suppress(KeyError, OSError):
        return getpass.getuser()
    return ""


def run_note(provenance: Mapping[str, Any]) -> str:
    """Describe a training run until its evaluation replaces this by the model card."""
    described = [f"- `{name}` (read by {stage}): md5 `{origin['md5']}`" for name, origin, stage in origins(provenance)]
    stages = " → ".join(stage["stage"] for stage in reversed(list(chain(provenance))))
    return "\n".join([f"PixelCLIP, {run_name(provenance)}. Stages: {stages}. Not evaluated yet.", "", *described])


def evaluation_metrics(metrics: Mapping[str, float], per_class: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Name the metrics of one evaluation for MLflow, in one group per labelled set; all but `images` in percent.

    Args:
        metrics: `KEY/NAME` as in `metrics.json`.
        per_class: rows of `per_class.json`.

    Returns:
        `eval/NAME/KEY`, and `eval/NAME/iou/CLASS` with the first synonym of every class that has labelled pixels.
    """
    named = {}
    # The classes belong to the plain name, which comes first; NAME.best may follow.
    plain = next(iter(metrics), "").partition("/")[2]
    for key, value in metrics.items():
        kind, _, label = key.partition("/")
        named[f"eval/{label}/{kind}"] = 100 * value if kind == "image_recall_clip" else value
    for index, row in enumerate(per_class):
        name = re.sub(r"[^\w\- ]", "_", row["class"].partition(",")[0].strip())[:_NAME_LENGTH]
        key = f"eval/{plain}/iou/{name}"
        if row["iou"] is not None:
            named[key if key not in named else f"{key} {index}"] = row["iou"]
    return named
