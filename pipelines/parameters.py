"""The pipeline's parameters: their names, and the checks that `submit` and the first step of the pipeline share.

KFP's form sorts parameters by name, so each begins with its topic. Running steps import this module, so it must not import kfp.
"""

import json
import shlex
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pixelclip.config import TrainConfig
from pixelclip.data.class_names import names_of
from pixelclip.fetch_data import look_inside
from pixelclip.settings import load, load_all, nearest, parse_overrides
from pixelclip.storage.files import parse_json
from pixelclip.storage.s3 import is_s3
from pixelclip.storage.urls import has_secret, public_url
from pixelclip_pipelines.artifacts import RUN
from pixelclip_pipelines.cluster_sections import RUN_VOLUME

SETTING_OF = {
    "masks_generator": "masks.generator",
    "train_clip": "train.clip",
    "train_steps": "train.steps",
    "train_batch_size": "train.batch_size",
    "train_concepts": "train.concepts",
    "train_seed": "train.seed",
    "register_name": "register.name",
    "register_min_gain": "register.min_gain",
}
"""Pipeline parameters that are settings of a stage. The parameter `settings` contains all others."""
SHORT_NAMES = {
    "generator": "masks.generator",
    "clip": "train.clip",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "concepts": "train.concepts",
    "seed": "train.seed",
    "registry_name": "register.name",
    "min_gain": "register.min_gain",
}
"""Short names of these settings on the command line and in the parameter `settings`."""
_NAMES = {**SHORT_NAMES, **SETTING_OF}
_NOT_PASSED = ("toy.", "fetch_data.")  # toy is not a step, and fetch_data has its own pipeline parameters


def arguments(
    images: str,
    labelled: str | None,
    workspace: str,
    params: Path | None,
    overrides: Mapping[str, Any],
    repo: str = "",
    revision: str = "",
    settings_file: str = "",
) -> dict[str, Any]:
    """Return the checked arguments of the pipeline.

    Args:
        images: folder of unlabelled images.
        labelled: labelled set, or None: the pipeline then does not evaluate.
        workspace: folder shared by runs, or empty.
        params: a YAML file with settings on this machine; the arguments contain what it changes.
        overrides: pipeline parameters, or settings as `stage.setting`.
        repo: DVC repository of the paths `images` and `labelled`; if empty, they are folders.
        revision: branch, tag or commit of `repo`.
        settings_file: like `params`, but a path in `repo`, which the pipeline reads itself.

    Raises:
        ValueError: an unknown parameter or setting, an invalid value, credentials in `repo`, or a setting given twice.
    """
    check_data(images, labelled, repo, revision, settings_file)
    chosen = by_setting(overrides)
    if settings_file and params:
        raise ValueError(f"--params {params} and --settings-file {settings_file}: give only one of them")
    if settings_file:
        _, text = look_inside(repo, revision or "HEAD", named_data(images, labelled).values(), settings_file)
        configs = settings_of(chosen, settings_file, text)
        sent = {name: value for name, value in flat(configs).items() if name in chosen}
    else:
        configs = check_settings(params, chosen)
        sent = changed(configs)
    named = {name: sent.get(setting, defaults()[name]) for name, setting in SETTING_OF.items()}
    # A parameter with its default leaves the setting to the file, so `settings` has to repeat it.
    left = {setting for name, setting in SETTING_OF.items() if settings_file and is_default(name, named)}
    settings = {name: value for name, value in sent.items() if name in left or name not in SETTING_OF.values()}
    data = {f"data_{name}": path for name, path in named_data(images, labelled).items()}
    data |= {"data_repo": repo, "data_revision": revision}
    return {**data, **named, "settings": as_text(settings), "settings_file": settings_file, "workspace": workspace}


def named_data(images: str, labelled: str | None) -> dict[str, str]:
    """Return the data of a run by name: images, and the labelled set unless it is None."""
    return {"images": images} | ({} if labelled is None else {"labelled": labelled})


def check_data(images: str, labelled: str | None, repo: str, revision: str, settings_file: str = "") -> None:
    """Check the parameters that name data; `labelled` is None without a labelled set.

    Raises:
        ValueError: a path is missing, `repo` contains credentials, or a parameter needs a repository and there is none.
    """
    for name, path in named_data(images, labelled).items():
        if not path:
            raise ValueError(f"{name} must name a folder")
    if has_secret(repo):
        raise ValueError(
            f"--repo {public_url(repo)} contains credentials, which KFP would store and display; "
            "pass them through git's environment variables, see docs/cluster.md"
        )
    if revision and not repo:
        raise ValueError(f"revision {revision!r} without --repo: only data in a DVC repository have revisions")
    if settings_file and not repo:
        raise ValueError(f"settings file {settings_file!r} without --repo: it must be a path in the DVC repository")


def check_source(option: str, place: str) -> None:
    """Raise ValueError if the place of data is missing, or a URL with credentials, which KFP would store and display."""
    if not place:
        raise ValueError(f"{option} must name a folder")
    if has_secret(place):
        raise ValueError(f"--{option} {public_url(place)} contains credentials or a query, which KFP would store and display")


def check_place(workspace: str, volume: str, nodes: int = 1) -> None:
    """Check the workspace of a run.

    Args:
        workspace: folder shared by the steps, or empty.
        volume: folder in which the steps share a volume, `/` on one machine, or empty if they share none.
        nodes: number of training nodes.

    Raises:
        ValueError: the workspace is not on the volume, so every pod would have its own folder, or several nodes have none.
    """
    if nodes > 1 and not workspace:
        raise ValueError(f"--nodes {nodes} needs --workspace: a folder on the volume that the nodes share")
    if workspace and not (volume and Path(workspace).is_relative_to(volume)):
        mounted = f"mounted at {volume}" if volume else "none"
        raise ValueError(
            f"--workspace {workspace}: must be a folder on the volume that steps share (volume in cluster.yaml: {mounted})"
        )


def check_prediction(classes: str, workspace: str, out: str, volume: str) -> None:
    """Check class names and places of a prediction.

    Args:
        classes: class names, `dog|puppy,grass,sky`.
        workspace, volume: see `check_place`.
        out: s3:// prefix, or empty.

    Raises:
        ValueError: a class name or place is invalid, or the result would be deleted with the volume of the run.
    """
    names_of(classes)
    check_place(workspace, volume)
    if workspace and not out and Path(workspace).is_relative_to(RUN_VOLUME):
        raise ValueError(f"out must be an s3:// prefix: the workspace {workspace} is a volume that KFP deletes after the run")
    if out and not is_s3(out):
        raise ValueError(f"out {out}: must be s3://bucket/folder; for a folder on the volume, set workspace")


def check_scheduled(workspace: str, out: str) -> None:
    """Check that the runs of a scheduled prediction write to different places: a finished result is never overwritten.

    Raises:
        ValueError: `workspace` or `out` has no `{run}`.
    """
    for name, place in (("workspace", workspace), ("out", out)):
        if place and RUN not in place and not (name == "workspace" and Path(place).is_relative_to(RUN_VOLUME)):
            raise ValueError(f"{name} {place}: each run of a schedule needs its own place, such as {place.rstrip('/')}/{RUN}")


def check_batch(train: TrainConfig, nodes: int, gpus: int) -> None:
    """Check that every training process gets an image of each micro-batch.

    Args:
        train: settings of the training.
        nodes: number of training nodes.
        gpus: GPUs of each node.

    Raises:
        ValueError: the batch is too small.
    """
    processes = nodes * max(1, gpus if train.device in ("auto", "cuda") else 1)
    if train.batch_size < processes * train.accumulate:
        raise ValueError(
            f"train.batch_size {train.batch_size} is too small for {processes} processes with train.accumulate "
            f"{train.accumulate}: every micro-batch needs at least one image"
        )


def by_setting(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return overrides with every pipeline parameter replaced by its setting `stage.setting`.

    Raises:
        ValueError: an unknown pipeline parameter, or a setting given twice.
    """
    chosen: dict[str, Any] = {}
    for name, value in overrides.items():
        if "." not in name and name not in _NAMES:
            raise ValueError(
                f"unknown pipeline parameter {name!r}{nearest(name, _NAMES)}; "
                f"the parameters are {', '.join(SHORT_NAMES)}; write other settings as STAGE.SETTING; "
                "data are options, see --help"
            )
        setting = _NAMES.get(name, name)
        if setting in chosen:
            raise ValueError(f"{setting} is given twice")
        chosen[setting] = value
    return chosen


def check_settings(params: Path | None, chosen: Mapping[str, Any], origin: str = "") -> dict[str, Any]:
    """Return the settings of every stage.

    Args:
        params: YAML file with one section per stage, or None.
        chosen: `stage.setting: value`, overriding `params`.
        origin: origin of `chosen`, for errors.

    Raises:
        ValueError: an unknown setting, an invalid value or combination, a URL with credentials, or a part of the masks.
    """
    configs = load_all(params, chosen, origin)
    check_public(configs)
    if part := configs["masks"].part:
        raise ValueError(
            f"masks.part {part}: must be empty, since the pipeline computes all parts; their number is `parts` in cluster.yaml"
        )
    return configs


def check_public(configs: Mapping[str, Any]) -> None:
    """Raise ValueError if a setting of a stage is a URL with credentials, which would become parameters of a pipeline."""
    for name, value in flat(configs).items():
        if isinstance(value, str) and has_secret(value):
            raise ValueError(
                f"{name} {public_url(value)} contains credentials or a query, which KFP would store and display; "
                "use a file on the volume that steps share, or s3:// with keys in environment variables"
            )


def settings_of(chosen: Mapping[str, Any], name: str, text: str) -> dict[str, Any]:
    """Return the settings of every stage, where `text` is the content of the settings file `name`; see `check_settings`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "params.yaml")
        file.write_text(text)
        try:
            return check_settings(file, chosen, "settings")
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), name)) from None


def of_form(form: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings chosen in KFP's form as `stage.setting: value`: fields without their default, and `settings`.

    Raises:
        ValueError: `settings` cannot be parsed, names an unknown parameter, or repeats a field.
    """
    fields = {setting: form[name] for name, setting in SETTING_OF.items() if not is_default(name, form)}
    written = by_setting(parse(form["settings"]))
    for name, setting in SETTING_OF.items():
        if setting in fields and setting in written:
            raise ValueError(f"{setting} is given twice: in {name} ({fields[setting]}) and in settings ({written[setting]})")
    return {**fields, **written}


@cache
def defaults() -> Mapping[str, Any]:
    """Return the default of every parameter in `SETTING_OF`."""
    parts = {name: setting.partition(".") for name, setting in SETTING_OF.items()}
    return {name: getattr(load(stage), field) for name, (stage, _, field) in parts.items()}


def is_default(name: str, form: Mapping[str, Any]) -> bool:
    """Return whether a parameter in `SETTING_OF` has its default, which leaves the setting to the settings file."""
    return bool(form[name] == defaults()[name])


def flat(configs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of all stages as `stage.setting: value`."""
    return {f"{stage}.{name}": value for stage, config in configs.items() for name, value in config}


def changed(configs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from their defaults as `stage.setting: value`, without those that no step reads."""
    names = [f"{stage}.{name}" for stage, config in configs.items() for name in config.model_dump(exclude_defaults=True)]
    values = flat(configs)
    return {name: values[name] for name in names if not name.startswith(_NOT_PASSED)}


def parse(settings: str | Mapping[str, Any]) -> dict[str, Any]:
    """Parse the pipeline's parameter `settings`.

    Args:
        settings: as on the command line (`train.crop=80 evaluate.side=144`, values are texts), a JSON object, or a mapping.

    Raises:
        ValueError: neither of them.
    """
    if isinstance(settings, Mapping):
        return dict(settings)
    if not isinstance(settings, str):
        raise ValueError(f"settings must be text such as 'train.crop=80 evaluate.side=144', found {settings!r}")
    if settings.lstrip().startswith("{"):
        return dict(parse_json(settings, "settings (NAME=VALUE separated by spaces, or JSON)", dict[str, Any]))
    try:
        words = shlex.split(settings)
    except ValueError as error:
        raise ValueError(f"settings {settings!r}: {str(error).lower()}") from None
    return parse_overrides(words)


def as_text(settings: Mapping[str, Any]) -> str:
    """Write settings as one line of a shell, the reverse of `parse`."""
    return shlex.join(as_arguments(settings))


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as arguments NAME=VALUE of a command; texts are written as they are."""
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
