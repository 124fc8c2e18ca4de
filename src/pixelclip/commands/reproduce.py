"""Reproduce a registered model: restore data and settings, evaluate it (or also train it), and compare the metrics.

Every input must have the recorded MD5. An input that is not at its recorded path is fetched by DVC if its provenance has a
repository and revision; if training is repeated, its stage can run again instead. The work is logged to a new MLflow run; the
recorded run does not change.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pixelclip import __version__, evaluate, masks, shards, train
from pixelclip.config import STAGES, lasting
from pixelclip.data.labelled_sets import describe_labelled, open_labelled
from pixelclip.data.shard_sources import describe_shards
from pixelclip.evaluation.protocol import first_resize
from pixelclip.models.clip_sources import clip_folder
from pixelclip.registry.lineage import Registered, recorded
from pixelclip.registry.model_version import fetch
from pixelclip.registry.promotion import registry
from pixelclip.settings import build
from pixelclip.storage.download import local_path
from pixelclip.storage.files import write_json
from pixelclip.storage.s3 import is_s3
from pixelclip.tracking.journal import RUN
from pixelclip.tracking.run import PARENT_RUN, lineage_tags
from pixelclip.tracking.server import experiment_id
from pixelclip.workflow.code_version import CHANGED, code_image, code_revision
from pixelclip.workflow.provenance import chain, flatten, source
from pixelclip.workflow.stage import describe

COMPARISON = "reproduction.json"
_REPEATABLE: dict[str, tuple[str, Callable[[Any, Path, Any], Any]]] = {
    "shards": ("images", shards.run),
    "masks": ("shards", masks.run),
    "train": ("masks", train.run),
}
"""Main input and function of every repeatable stage."""
_SHARDS = ("shards", "masks")
_SETTING = {name: name for name in ("clip", "dino", "weights", "concept_names", "names")}
_SETTING |= {"given": "given_folder", "labels": "labels_folder", "masks": "masks_folder"}
"""Setting with the path of each other input."""
_EVALUATED_BEFORE = {**first_resize({}), "names": "readable"}
"""What evaluations before 0.2.0 did; their records lack these settings."""


@dataclass(frozen=True)
class _Work:
    """Output folder and runtime settings of a reproduction."""

    out: Path
    runtime: Mapping[str, Any]

    def config(self, stage: str, settings: Mapping[str, Any]) -> Any:
        """Combine a stage's recorded settings with the runtime settings."""
        runtime = {key.partition(".")[2]: value for key, value in self.runtime.items() if key.startswith(f"{stage}.")}
        return build(STAGES[stage], {**settings, **runtime}, f"stage {stage}")


def run(uri: str, out: Path, *, train: bool = False, tolerance: float = 0.01, runtime: Mapping[str, Any] | None = None) -> bool:
    """Repeat the evaluation of a registered model and compare the metrics.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        out: output folder, also of `reproduction.json`; finished parts are reused.
        train: also repeat training, and evaluate the new model.
        tolerance: maximum difference of equal metrics, in points (default 0.01: label maps of CPUs and GPUs differ in single
            pixels).
        runtime: settings that do not change results, such as `evaluate.device`; the others are as recorded.

    Returns:
        Whether all metrics are equal within the tolerance.

    Raises:
        ValueError: the model is unknown, data changed or cannot be restored, a setting is not a runtime setting, or MLflow
            is unreachable.
    """
    work = _Work(out, _checked(runtime or {}))
    model_record = recorded(uri)
    provenance, name = model_record.provenance, f"models:/{model_record.version.name}/{model_record.version.version}"
    repeated = [stage for stage in chain(provenance) if train or stage["stage"] in ("evaluate", "evaluate_clip")]
    for line in _other_code(repeated):
        print(f"reproduce: WARNING: {line}", flush=True)
    with _new_run(model_record, name) as (client, run_id):
        inputs, settings = provenance["inputs"], _EVALUATED_BEFORE | provenance["settings"]
        model = _repeat(inputs["model"], work) if train else _fetch_model(name, inputs["model"]["md5"], out)
        kind = settings["kind"]
        labelled = _restore("labelled", inputs["labelled"], work, kind=kind)
        settings["name"] = settings["name"] or (kind if kind != "folder" else Path(inputs["labelled"]["path"]).name)
        config = work.config("evaluate", _update_paths(provenance, settings, work))
        # A newly trained model may differ, so its evaluation has a separate folder.
        metrics = evaluate.run(model, labelled, out / ("train_evaluation" if train else "evaluation"), config)
        equal, differences = compare(model_record.metrics, metrics, tolerance)
        result = {"uri": uri, "equal": equal, "tolerance": tolerance, "recorded": model_record.metrics, "found": metrics}
        write_json(out / COMPARISON, result)
        verdict = f"{'equal' if equal else 'DIFFERENT'} within {tolerance:g} points"
        print(f"\n{differences}\n\nreproduce: {name} on {model_record.version.tags['labelled.name']}: {verdict}")
        client.set_tag(run_id, "reproduction", "equal" if equal else "differs")
    return equal


def compare(recorded: Mapping[str, float], found: Mapping[str, float], tolerance: float) -> tuple[bool, str]:
    """Compare metrics; return whether all are equal, and a table.

    Args:
        recorded: metrics by name; recall, in 0..1, is also compared in points.
        found: the same metrics, evaluated again.
        tolerance: maximum difference of equal metrics, in points.
    """
    equal = True
    lines = [f"{'':<32} {'recorded':>10} {'now':>10} {'differs by':>11}"]
    for name in sorted({*recorded, *found}):
        scale = 100.0 if "recall" in name else 1.0
        old, new = (scale * float(metrics.get(name, math.nan)) for metrics in (recorded, found))
        same = abs(new - old) <= tolerance  # a missing metric is NaN, which is never equal
        equal &= same
        lines.append(f"{name:<32} {old:>10.4f} {new:>10.4f} {new - old:>11.2g}{'' if same else '  <--'}")
    return equal, "\n".join(lines)


def _checked(runtime: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in runtime:
        stage, _, name = key.partition(".")
        if stage not in STAGES or name not in STAGES[stage].model_fields:
            raise ValueError(f"unknown setting {key!r}; settings are written STAGE.SETTING, such as evaluate.device")
        if name in lasting(STAGES[stage]()):
            raise ValueError(f"{key} changes the result of stage {stage}; its recorded value is used")
    return runtime


def _other_code(stages: Iterable[Mapping[str, Any]]) -> list[str]:
    """List the differences between the current code and the code that ran the stages."""
    now = {"revision": code_revision(), "version": __version__, "image": code_image()}
    differing: dict[str, list[str]] = {}
    for stage in stages:
        before = {key: stage.get(key, "") for key in now}
        changes = [f"{key} {before[key] or 'none'}, now {now[key] or 'none'}" for key in now if before[key] != now[key]]
        changes += ["it had uncommitted changes"] if CHANGED in str(stage.get("revision")) else []
        if changes:
            differing.setdefault("; ".join(changes), []).append(stage["stage"])
    return [f"{', '.join(names)}: run with different code: {changes}" for changes, names in differing.items()]


@contextmanager
def _new_run(model: Registered, name: str) -> Iterator[tuple[MlflowClient, str]]:
    """Open a new MLflow run for the stages of this process, so that nothing is logged to the recorded run."""
    tags = lineage_tags(model.provenance) | {"reproduces": name, "reproduces.run": model.version.run_id}
    tags.pop("mlflow.parentRunId", None)
    with registry(model.version.name) as client:
        run_name = f"reproduce {name.removeprefix('models:/')}"
        run_id = client.create_run(experiment_id(client), run_name=run_name, tags=tags).info.run_id
        before = {name: os.environ.pop(name) for name in ("MLFLOW_RUN_ID", PARENT_RUN) if name in os.environ}
        os.environ["MLFLOW_RUN_ID"] = run_id
        status = "FAILED"
        try:
            yield client, run_id
            status = "FINISHED"
        finally:
            del os.environ["MLFLOW_RUN_ID"]
            os.environ.update(before)
            client.set_terminated(run_id, status)


def _fetch_model(name: str, md5: str, out: Path) -> Path:
    (out / "model").mkdir(parents=True, exist_ok=True)
    model = fetch(name, out / "model")
    (model / RUN).unlink(missing_ok=True)  # otherwise the evaluation is logged to the recorded run
    if (actual := describe(model)["md5"]) != md5:
        raise ValueError(f"{model}: has md5 {actual}, the evaluated model had {md5}")
    return model


def _restore(name: str, described: Mapping[str, Any], work: _Work, *, kind: str = "folder", spec: str = "") -> Path | str:
    """Return an input with the recorded MD5: at its old path, fetched by DVC, or from a repeated stage."""
    path, md5, change = described["path"], described["md5"], "no longer exists"
    current = _resolve(name, spec or path)
    if current is not None and (is_s3(current) or Path(current).exists()):
        if (actual := _md5(name, current, kind)) == md5:
            return current
        change = f"now has md5 {actual}"
    fetched = source(described)
    if fetched.get("repo"):
        print(f"reproduce: {name} is fetched from {fetched['repo']} at {fetched['git_sha']}", flush=True)
        config = build(STAGES["fetch_data"], {"path": fetched["path"], "revision": fetched["git_sha"]}, name)
        copy = work.out / "data" / name
        import_module("pixelclip.fetch_data").run(fetched["repo"], copy, config)  # imported late: DVC is an extra
        if (actual := _md5(name, copy, kind)) != md5:
            raise ValueError(f"{copy}: {name}, fetched by DVC, has md5 {actual} instead of the recorded {md5}")
        return copy
    if described.get("provenance", {}).get("stage") in _REPEATABLE:
        return _repeat(described, work)
    raise ValueError(f"{name}: {path} with md5 {md5} {change}, and DVC does not track it")


def _md5(name: str, spec: Path | str, kind: str) -> str:
    if name in _SHARDS:
        return str(describe_shards(spec)["md5"])
    path = Path(spec)
    if name == "labelled":
        files = () if kind == "folder" else (file for pair in open_labelled(path, kind).pairs for file in pair)
        return str(describe_labelled(path, kind, files)["md5"])
    return str(describe(path)["md5"])


def _repeat(described: Mapping[str, Any], work: _Work) -> Path:
    """Repeat the stage that wrote an input, and print whether its output is the same."""
    provenance = described["provenance"]
    name, out = provenance["stage"], work.out / provenance["stage"]
    if name not in _REPEATABLE:
        raise ValueError(f"{described['path']}: stage {name} cannot be repeated, only {', '.join(_REPEATABLE)}")
    if provenance["settings"].get("dino") and "dino_side" not in provenance["settings"]:
        raise ValueError(
            f"{described['path']}: DINO saw the view of CLIP before 0.2.0; this version cannot repeat that training"
        )
    main_input, repeat = _REPEATABLE[name]
    main = _restore(main_input, provenance["inputs"][main_input], work)
    whole = {"part": ""} if name == "masks" else {}
    repeat(main, out, work.config(name, _update_paths(provenance, dict(provenance["settings"]), work) | whole))
    if provenance["settings"].get("part"):
        verdict = "run as a whole, but recorded in parts"
    else:
        verdict = "the same files as recorded" if describe(out)["md5"] == described["md5"] else "different files than recorded"
    print(f"reproduce: {name}: {verdict}", flush=True)
    return out


def _update_paths(provenance: Mapping[str, Any], settings: dict[str, Any], work: _Work) -> dict[str, Any]:
    """Point a stage's settings to the current paths of its weights and other inputs."""
    defaults = {"clip": flatten(provenance).get("train.clip", "")}  # used by an evaluation whose own setting is empty
    for name, described in provenance["inputs"].items():
        setting = _SETTING.get(name, "")
        if spec := str(settings.get(setting) or defaults.get(name, "")):  # the main input of a stage is not a setting
            # A model whose masks were used was trained on other masks, so its stages need folders of their own.
            apart = replace(work, out=work.out / name) if name == "weights" else work
            restored = _restore(name, described, apart, spec=spec)
            if restored != _resolve(name, spec):  # otherwise the recorded setting is still valid
                path = described["path"]
                settings[setting] = spec.replace(path, str(restored)) if path in spec else str(restored)
    return settings


@lru_cache
def _fetched(uri: str) -> Path | None:
    """Fetch a registered model once; None if there is no such model any more."""
    try:
        return fetch(uri)
    except ValueError as error:
        print(f"reproduce: {error}", flush=True)
        return None


def _resolve(name: str, spec: str) -> Path | str | None:
    """Return the local path of a path, a URI or a CLIP name; None for a CLIP that is missing.

    Shards in a store are not copied: stages identify them by the store's listing.
    """
    if name == "clip":
        return clip_folder(spec)
    if spec.startswith("models:/"):
        return _fetched(spec)
    return spec if name in _SHARDS and is_s3(spec) else local_path(spec)
