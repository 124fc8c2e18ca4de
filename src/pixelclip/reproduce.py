"""A registered model made again: data and settings are restored, it is measured (or trained, too), the numbers compared.

Every input is looked for where it was; it must have the recorded md5. What is not there any more is fetched by DVC, where
its provenance names repository and revision, or, when training is repeated, made again from what it was made of. The work is
logged to an MLflow run of its own: the recorded run stays as it is.
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
from pixelclip.benchmarks import open_labelled
from pixelclip.config import STAGES, build, lasting
from pixelclip.download import here
from pixelclip.journal import RUN
from pixelclip.lineage import Registered, recorded
from pixelclip.model_version import fetch
from pixelclip.promotion import registry
from pixelclip.provenance import chain, flatten, source
from pixelclip.s3 import is_s3
from pixelclip.server import experiment_id
from pixelclip.sources import clip_folder, describe_shards
from pixelclip.stage import CHANGED, code_image, code_revision, describe
from pixelclip.storage import digest, write_json
from pixelclip.tracking import PARENT_RUN, lineage

COMPARISON = "reproduction.json"
_READ = {"shards": "images", "masks": "shards", "train": "masks"}
"""What a stage that can be repeated reads."""
_SHARDS = ("shards", "masks")
_SETTING = {
    "clip": "clip",
    "dino": "dino",
    "weights": "weights",
    "concept_names": "concept_names",
    "given": "given_folder",
    "masks": "masks_folder",
}
"""Every other input is named by a setting."""


@dataclass(frozen=True)
class _Work:
    """Where everything is restored and made, and the runtime settings that this machine needs."""

    out: Path
    runtime: Mapping[str, Any]

    def config(self, stage: str, settings: Mapping[str, Any]) -> Any:
        """A stage's recorded settings with the runtime ones of now."""
        own = {key.partition(".")[2]: value for key, value in self.runtime.items() if key.startswith(f"{stage}.")}
        return build(STAGES[stage], {**settings, **own}, f"stage {stage}")


def run(uri: str, out: Path, *, train: bool = False, tolerance: float = 0.01, runtime: Mapping[str, Any] | None = None) -> bool:
    """Measures a registered model again, as it was measured when it was registered, and says whether the numbers are equal.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        out: folder for everything that is restored and made, and for `reproduction.json`; finished parts are reused.
        train: train anew, too, and measure what comes out.
        tolerance: largest difference of a figure that counts as equal, in points (0.01 of a point by default: the label
            maps of CPUs and GPUs differ in single pixels).
        runtime: settings that change where or how fast a stage runs, as `evaluate.device`; others are as recorded.

    Returns:
        Whether all figures are equal within the tolerance.

    Raises:
        ValueError: no such model, data that cannot be restored or are not what they were, a setting that is not a runtime
            one, or MLflow is unreachable.
    """
    work = _Work(out, _checked(runtime or {}))
    there = recorded(uri)
    measured = [made for made in chain(there.provenance) if train or made["stage"] in ("evaluate", "evaluate_clip")]
    for line in _other_code(measured):
        print(f"reproduce: WARNING: {line}", flush=True)
    with _own_run(there) as client_and_run:
        inputs = there.provenance["inputs"]
        model = _made_again(inputs["model"], work) if train else _fetched(there, out)
        settings, kind = dict(there.provenance["settings"]), there.provenance["settings"]["kind"]
        labelled = _restored("labelled", inputs["labelled"], work, kind=kind)
        label = there.version.tags["labelled.name"]
        settings["name"] = settings["name"] or (kind if kind != "folder" else Path(inputs["labelled"]["path"]).name)
        config = work.config("evaluate", _named_again(there.provenance, settings, work))
        # A model that is trained anew may be another one: its evaluation stands beside that of the recorded one.
        found = evaluate.run(model, labelled, out / ("train_evaluation" if train else "evaluation"), config)
        equal, differences = compare(there.metrics, found, tolerance)
        said = {"uri": uri, "equal": equal, "tolerance": tolerance, "recorded": there.metrics, "found": found}
        write_json(out / COMPARISON, said)
        print(f"\n{differences}\n")
        word = "equal" if equal else "DIFFERENT"
        print(f"reproduce: models:/{there.version.name}/{there.version.version} on {label}: {word} within {tolerance:g} points")
        client, run_id = client_and_run
        client.set_tag(run_id, "reproduction", "equal" if equal else "differs")
    return equal


def compare(recorded: Mapping[str, float], found: Mapping[str, float], tolerance: float) -> tuple[bool, str]:
    """Whether figures are equal, and all of them as a table.

    Args:
        recorded: figures by name; those in 0..1 (recall) are compared in points, too.
        found: the same figures, measured again.
        tolerance: largest difference that counts as equal, in points.
    """
    equal = True
    lines = [f"{'':<32} {'recorded':>10} {'now':>10} {'differs by':>11}"]
    for name in sorted({*recorded, *found}):
        scale = 100.0 if "recall" in name else 1.0
        old, new = (scale * float(figures.get(name, math.nan)) for figures in (recorded, found))
        same = abs(new - old) <= tolerance  # a missing figure is NaN, which is never equal
        equal &= same
        lines.append(f"{name:<32} {old:>10.4f} {new:>10.4f} {new - old:>11.2g}{'' if same else '  <--'}")
    return equal, "\n".join(lines)


def _checked(runtime: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in runtime:
        stage, _, name = key.partition(".")
        if stage not in STAGES or name not in STAGES[stage].model_fields:
            raise ValueError(f"setting {key!r} is none; it is written STAGE.SETTING, as evaluate.device")
        if name in lasting(STAGES[stage]()):
            raise ValueError(f"{key} changes what stage {stage} makes: it is taken as it was recorded")
    return runtime


def _other_code(stages: Iterable[Mapping[str, Any]]) -> list[str]:
    """How the code of now differs from that of stages, a line for each difference."""
    now = {"revision": code_revision(), "version": __version__, "image": code_image()}
    found: dict[str, list[str]] = {}
    for stage in stages:
        then = {key: stage.get(key, "") for key in now}
        said = [f"{key} {then[key] or 'none'}, now {now[key] or 'none'}" for key in now if then[key] != now[key]]
        if CHANGED in str(then["revision"]):
            said.append("it held uncommitted changes")
        if said:
            found.setdefault("; ".join(said), []).append(stage["stage"])
    return [f"{', '.join(names)}: run by other code: {said}" for said, names in found.items()]


@contextmanager
def _own_run(there: Registered) -> Iterator[tuple[MlflowClient, str]]:
    """A run for the stages of this process, so that nothing is added to the recorded one."""
    name = f"{there.version.name}/{there.version.version}"
    tags = lineage(there.provenance) | {"reproduces": f"models:/{name}", "reproduces.run": there.version.run_id}
    tags.pop("mlflow.parentRunId", None)
    with registry(there.version.name) as client:
        run_id = client.create_run(experiment_id(client), run_name=f"reproduce {name}", tags=tags).info.run_id
        before = {variable: os.environ.pop(variable, None) for variable in ("MLFLOW_RUN_ID", PARENT_RUN)}
        os.environ["MLFLOW_RUN_ID"] = run_id
        status = "FAILED"
        try:
            yield client, run_id
            status = "FINISHED"
        finally:
            del os.environ["MLFLOW_RUN_ID"]
            os.environ.update({variable: value for variable, value in before.items() if value is not None})
            client.set_terminated(run_id, status)


def _fetched(there: Registered, out: Path) -> Path:
    """The registered model itself."""
    (out / "model").mkdir(parents=True, exist_ok=True)
    model = fetch(f"models:/{there.version.name}/{there.version.version}", out / "model")
    (model / RUN).unlink(missing_ok=True)  # else its evaluation would be added to the recorded run
    if (md5 := describe(model)["md5"]) != there.provenance["inputs"]["model"]["md5"]:
        raise ValueError(f"{model}: is not the model that was measured (md5 {md5})")
    return model


def _restored(name: str, described: Mapping[str, Any], work: _Work, *, kind: str = "folder", spec: str = "") -> Path | str:
    """An input as it was: where it was, from DVC, or made again."""
    said, wrong = described["path"], ""
    at = _at(name, spec or said)
    if at is not None and (is_s3(at) or Path(at).exists()):
        md5 = _md5(name, at, kind)
        if md5 == described["md5"]:
            return at
        wrong = f", but what stands there now has md5 {md5}"
    fetched = source(described)
    if fetched.get("repo"):
        print(f"reproduce: {name} is fetched from {fetched['repo']} at {fetched['git_sha']}", flush=True)
        # Imported here: DVC is an extra, and most reproductions find their data where they were.
        config = build(STAGES["fetch_data"], {"path": fetched["path"], "revision": fetched["git_sha"]}, name)
        place = work.out / "data" / name
        import_module("pixelclip.fetch_data").run(fetched["repo"], place, config)
        if (md5 := _md5(name, place, kind)) != described["md5"]:
            raise ValueError(f"{place}: {name} was fetched by DVC, but has md5 {md5} where {described['md5']} is recorded")
        return place
    if described.get("provenance", {}).get("stage") in _READ:
        return _made_again(described, work)
    raise ValueError(f"{name}: was {said} with md5 {described['md5']}{wrong}; it is not there, and DVC does not know it")


def _md5(name: str, at: Path | str, kind: str) -> str:
    if name in _SHARDS:
        return str(describe_shards(at)["md5"])
    path = Path(at)
    if name == "labelled" and kind != "folder":  # of a benchmark only what is read counts, as in `evaluate`
        return str(digest(path, {file for pair in open_labelled(path, kind).pairs for file in pair})["md5"])
    return str(describe(path)["md5"])


def _made_again(described: Mapping[str, Any], work: _Work) -> Path:
    """Repeats the stage that made an input, and says whether the same came out."""
    made = described["provenance"]
    name = made["stage"]
    if name not in _READ:
        raise ValueError(
            f"{described['path']}: was made by stage {name}, which cannot be repeated; these can: {', '.join(_READ)}"
        )
    read = _restored(_READ[name], made["inputs"][_READ[name]], work)
    config = work.config(name, _named_again(made, dict(made["settings"]), work) | _whole(name))
    repeat: dict[str, Callable[[Any, Path, Any], Any]] = {"shards": shards.run, "masks": masks.run, "train": train.run}
    repeat[name](read, work.out / name, config)
    verdict = "the same files as recorded"
    if made["settings"].get("part"):
        verdict = "made in one piece, where the recorded ones were made in parts"
    elif describe(work.out / name)["md5"] != described["md5"]:
        verdict = "other files than recorded"
    print(f"reproduce: {name}: {verdict}", flush=True)
    return work.out / name


def _whole(name: str) -> dict[str, Any]:
    """Masks that were made in parts are made in one piece."""
    return {"part": ""} if name == "masks" else {}


def _named_again(made: Mapping[str, Any], settings: dict[str, Any], work: _Work) -> dict[str, Any]:
    """A stage's settings with the places where its weights and further inputs stand now."""
    usual = {"clip": flatten(made).get("train.clip", "")}  # an evaluation's, where its own setting is empty
    for name, described in made["inputs"].items():
        setting = _SETTING.get(name)
        if setting is None or name == _READ.get(made["stage"]):
            continue
        if spec := str(settings.get(setting) or usual.get(name, "")):
            place = _restored(name, described, work, spec=spec)
            if place != _at(name, spec):  # else the recorded setting leads there still
                known = described["path"]
                settings[setting] = spec.replace(known, str(place)) if known in spec else str(place)
    return settings


def _at(name: str, spec: str) -> Path | str | None:
    """Where a path, a URI or the name of a CLIP leads here; None for a CLIP that is not there.

    Shards in a store stay there: their stages read and identify them by the store's listing, which copies have not.
    """
    if name == "clip":
        return clip_folder(spec)
    return spec if name in _SHARDS and is_s3(spec) else here(spec)
