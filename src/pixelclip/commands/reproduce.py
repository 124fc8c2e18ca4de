"""Reproduce a registered model: restore data and settings, evaluate it (or train it, too), and compare the metrics.

Every input must have the recorded md5. It is looked for at its recorded place. If it is gone, it is fetched by DVC where its
provenance has a repository and revision or, when training is repeated, made again from its own inputs. The work is logged to
a new MLflow run; the recorded run does not change.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pixelclip import __version__, evaluate, masks, shards, train
from pixelclip.config import STAGES, build, lasting
from pixelclip.data.labelled_sets import open_labelled
from pixelclip.data.shard_sources import describe_shards
from pixelclip.models.clip_sources import clip_folder
from pixelclip.registry.lineage import Registered, recorded
from pixelclip.registry.model_version import fetch
from pixelclip.registry.promotion import registry
from pixelclip.storage.download import local_path
from pixelclip.storage.files import digest, write_json
from pixelclip.storage.s3 import is_s3
from pixelclip.tracking.journal import RUN
from pixelclip.tracking.run import PARENT_RUN, lineage
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
"""Main input and function of every stage that can be repeated."""
_SHARDS = ("shards", "masks")
_SETTING = {name: name for name in ("clip", "dino", "weights", "concept_names")}
_SETTING |= {"given": "given_folder", "masks": "masks_folder"}
"""The setting that holds the path of each further input."""


@dataclass(frozen=True)
class _Work:
    """Output folder, and the runtime settings for this machine."""

    out: Path
    runtime: Mapping[str, Any]

    def config(self, stage: str, settings: Mapping[str, Any]) -> Any:
        """Build a stage's recorded settings with today's runtime settings."""
        runtime = {key.partition(".")[2]: value for key, value in self.runtime.items() if key.startswith(f"{stage}.")}
        return build(STAGES[stage], {**settings, **runtime}, f"stage {stage}")


def run(uri: str, out: Path, *, train: bool = False, tolerance: float = 0.01, runtime: Mapping[str, Any] | None = None) -> bool:
    """Evaluate a registered model again, as for its registration, and compare the metrics.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        out: folder for everything restored or made, and for `reproduction.json`; finished parts are reused.
        train: also train anew, and evaluate the new model.
        tolerance: largest difference that counts as equal, in points (default 0.01: the label maps of CPUs and GPUs differ
            in single pixels).
        runtime: settings that change where or how fast a stage runs, such as `evaluate.device`; others are as recorded.

    Returns:
        Whether all metrics are equal within the tolerance.

    Raises:
        ValueError: an unknown model, data that cannot be restored or have changed, a setting that is not a runtime one, or
            an unreachable MLflow server.
    """
    work = _Work(out, _checked(runtime or {}))
    model_record = recorded(uri)
    provenance, name = model_record.provenance, f"models:/{model_record.version.name}/{model_record.version.version}"
    repeated = [stage for stage in chain(provenance) if train or stage["stage"] in ("evaluate", "evaluate_clip")]
    for line in _other_code(repeated):
        print(f"reproduce: WARNING: {line}", flush=True)
    with _new_run(model_record, name) as (client, run_id):
        inputs, settings = provenance["inputs"], dict(provenance["settings"])
        model = _repeat(inputs["model"], work) if train else _fetch_model(name, inputs["model"]["md5"], out)
        kind = settings["kind"]
        labelled = _restore("labelled", inputs["labelled"], work, kind=kind)
        settings["name"] = settings["name"] or (kind if kind != "folder" else Path(inputs["labelled"]["path"]).name)
        config = work.config("evaluate", _update_paths(provenance, settings, work))
        # A newly trained model may differ, so its evaluation gets another folder than that of the recorded model.
        metrics = evaluate.run(model, labelled, out / ("train_evaluation" if train else "evaluation"), config)
        equal, differences = compare(model_record.metrics, metrics, tolerance)
        result = {"uri": uri, "equal": equal, "tolerance": tolerance, "recorded": model_record.metrics, "found": metrics}
        write_json(out / COMPARISON, result)
        verdict = f"{'equal' if equal else 'DIFFERENT'} within {tolerance:g} points"
        print(f"\n{differences}\n\nreproduce: {name} on {model_record.version.tags['labelled.name']}: {verdict}")
        client.set_tag(run_id, "reproduction", "equal" if equal else "differs")
    return equal


def compare(recorded: Mapping[str, float], found: Mapping[str, float], tolerance: float) -> tuple[bool, str]:
    """Return whether metrics are equal, and a table of all of them.

    Args:
        recorded: metrics by name; those in 0..1 (recall) are compared in points, too.
        found: the same metrics, evaluated again.
        tolerance: largest difference that counts as equal, in points.
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
            raise ValueError(f"unknown setting {key!r}; a setting is written STAGE.SETTING, such as evaluate.device")
        if name in lasting(STAGES[stage]()):
            raise ValueError(f"{key} changes the result of stage {stage}; its recorded value is used")
    return runtime


def _other_code(stages: Iterable[Mapping[str, Any]]) -> list[str]:
    """Differences between the current code and that of the stages, one per line."""
    now = {"revision": code_revision(), "version": __version__, "image": code_image()}
    differing: dict[str, list[str]] = {}
    for stage in stages:
        before = {key: stage.get(key, "") for key in now}
        changes = [f"{key} {before[key] or 'none'}, now {now[key] or 'none'}" for key in now if before[key] != now[key]]
        changes += ["it had uncommitted changes"] if CHANGED in str(stage.get("revision")) else []
        if changes:
            differing.setdefault("; ".join(changes), []).append(stage["stage"])
    return [f"{', '.join(names)}: run by other code: {changes}" for changes, names in differing.items()]


@contextmanager
def _new_run(model: Registered, name: str) -> Iterator[tuple[MlflowClient, str]]:
    """Open a new MLflow run for the stages of this process, so that nothing is logged to the recorded run."""
    tags = lineage(model.provenance) | {"reproduces": name, "reproduces.run": model.version.run_id}
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
    (model / RUN).unlink(missing_ok=True)  # otherwise the evaluation would be logged to the recorded run
    if (actual := describe(model)["md5"]) != md5:
        raise ValueError(f"{model}: has md5 {actual}, but the evaluated model had {md5}")
    return model


def _restore(name: str, described: Mapping[str, Any], work: _Work, *, kind: str = "folder", spec: str = "") -> Path | str:
    """Return a place of an input with the recorded md5: its old place, a copy fetched by DVC, or one made again."""
    path, md5, change = described["path"], described["md5"], "no longer exists"
    place = _resolve(name, spec or path)
    if place is not None and (is_s3(place) or Path(place).exists()):
        if (actual := _md5(name, place, kind)) == md5:
            return place
        change = f"now has md5 {actual}"
    fetched = source(described)
    if fetched.get("repo"):
        print(f"reproduce: {name} is fetched from {fetched['repo']} at {fetched['git_sha']}", flush=True)
        config = build(STAGES["fetch_data"], {"path": fetched["path"], "revision": fetched["git_sha"]}, name)
        copy = work.out / "data" / name
        import_module("pixelclip.fetch_data").run(fetched["repo"], copy, config)  # imported late: DVC is an extra
        if (actual := _md5(name, copy, kind)) != md5:
            raise ValueError(f"{copy}: {name} was fetched by DVC, but has md5 {actual} instead of the recorded {md5}")
        return copy
    if described.get("provenance", {}).get("stage") in _REPEATABLE:
        return _repeat(described, work)
    raise ValueError(f"{name}: {path} with md5 {md5} {change}, and DVC does not track it")


def _md5(name: str, place: Path | str, kind: str) -> str:
    if name in _SHARDS:
        return str(describe_shards(place)["md5"])
    path = Path(place)
    if name == "labelled" and kind != "folder":  # only the files that `evaluate` reads
        return str(digest(path, {file for pair in open_labelled(path, kind).pairs for file in pair})["md5"])
    return str(describe(path)["md5"])


def _repeat(described: Mapping[str, Any], work: _Work) -> Path:
    """Repeat the stage that made an input, and print whether its output is the same."""
    made = described["provenance"]
    name, out = made["stage"], work.out / made["stage"]
    if name not in _REPEATABLE:
        raise ValueError(f"{described['path']}: stage {name} cannot be repeated, only {', '.join(_REPEATABLE)}")
    main_input, repeat = _REPEATABLE[name]
    main = _restore(main_input, made["inputs"][main_input], work)
    whole = {"part": ""} if name == "masks" else {}
    repeat(main, out, work.config(name, _update_paths(made, dict(made["settings"]), work) | whole))
    if made["settings"].get("part"):
        verdict = "made in one piece, the recorded ones were made in parts"
    else:
        verdict = "the same files as recorded" if describe(out)["md5"] == described["md5"] else "other files than recorded"
    print(f"reproduce: {name}: {verdict}", flush=True)
    return out


def _update_paths(made: Mapping[str, Any], settings: dict[str, Any], work: _Work) -> dict[str, Any]:
    """Point a stage's settings to the current places of its weights and further inputs."""
    defaults = {"clip": flatten(made).get("train.clip", "")}  # used by an evaluation whose own setting is empty
    for name, described in made["inputs"].items():
        setting = _SETTING.get(name, "")
        if spec := str(settings.get(setting) or defaults.get(name, "")):  # the main input of a stage is no setting
            place = _restore(name, described, work, spec=spec)
            if place != _resolve(name, spec):  # otherwise the recorded setting is still valid
                path = described["path"]
                settings[setting] = spec.replace(path, str(place)) if path in spec else str(place)
    return settings


def _resolve(name: str, spec: str) -> Path | str | None:
    """Return the local path of a path, a URI or a CLIP name; None for a CLIP that is missing.

    Shards in a store stay there: stages identify them by the store's listing, which local copies do not have.
    """
    if name == "clip":
        return clip_folder(spec)
    return spec if name in _SHARDS and is_s3(spec) else local_path(spec)
