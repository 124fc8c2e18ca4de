"""The pipeline's first step: check everything that was typed into KFP's form, and pin the versions of data and CLIP.

Running steps import this module, so it must not import kfp.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pixelclip.config import EvaluateConfig, TrainConfig
from pixelclip.data.class_names import benchmark_names, names_of
from pixelclip.fetch_data import look_inside
from pixelclip.storage.download import check_exists
from pixelclip.storage.s3 import is_s3
from pixelclip.storage.urls import public_url
from pixelclip_pipelines.parameters import (
    SETTING_OF,
    changed,
    check_batch,
    check_data,
    check_place,
    check_settings,
    flat,
    named_data,
    of_form,
    settings_of,
)
from pixelclip_pipelines.steps import pinned, pinned_clip


class Pinned(NamedTuple):
    """Outputs of the first step, in the order of its component."""

    commit: str
    fetch: str
    clip_version: str
    clip_settings: dict[str, Any]
    stage_settings: dict[str, Any]
    generator: str
    clip: str
    steps: int
    batch_size: int
    concepts: int
    seed: int
    registry_name: str
    min_gain: float


def check_and_pin(form: Mapping[str, Any], volume: str, nodes: int, gpus: int) -> Pinned:
    """Check the parameters of a run, and resolve them to versions and settings for all other steps.

    Args:
        form: all parameters of the pipeline; `data_labelled` is None in the pipeline without a labelled set.
        volume, nodes: see `parameters.check_place`.
        gpus: GPUs of each training node.

    Raises:
        ValueError: a parameter or setting is wrong, or something that it names does not exist; one line per error.
    """
    images, labelled, workspace = form["data_images"], form["data_labelled"], form["workspace"]
    repo, revision, file = form["data_repo"], form["data_revision"], form["settings_file"]
    check_data(images, labelled, repo, revision, file)
    data = named_data(images, labelled)
    check_place(workspace, volume, nodes)
    chosen = of_form(form)
    if not file:  # before anything slow
        configs = check_settings(None, chosen)
    if repo:
        commit, text = look_inside(repo, revision or "HEAD", data.values(), file)
        print(f"{public_url(repo)}: {revision or 'HEAD'} is {commit}", flush=True)
        revision = commit
        configs = settings_of(chosen, file, text) if file else configs
    check_batch(configs["train"], nodes, gpus)
    errors = [] if repo else _errors(data.items())
    if errors := [*errors, *_errors_of_settings(configs)]:
        raise ValueError("\n".join(errors))
    values, settings = flat(configs), changed(configs)
    commit, fetch = pinned(repo, revision, workspace)
    version, of_clip = pinned_clip(values["train.clip"], settings, workspace)
    return Pinned(commit, fetch, version, of_clip, settings, *(values[setting] for setting in SETTING_OF.values()))


def _errors(places: Iterable[tuple[str, str]]) -> list[str]:
    """Return an error for every folder (name and place) that this step cannot find."""
    errors = []
    for name, place in places:
        try:
            if is_s3(place):
                check_exists(place)
            elif not Path(place).is_dir():
                raise ValueError(f"{place}: no such folder")
        except ValueError as error:
            errors.append(f"{name}: {error}")
    return errors


def _errors_of_settings(configs: Mapping[str, Any]) -> list[str]:
    """Return an error for everything that the settings name and that does not exist."""
    from pixelclip.models.clip_checks import check_clip

    masks, train, evaluate = configs["masks"], configs["train"], configs["evaluate"]
    looked_at = [
        ("masks.weights", masks.weights, check_exists),
        ("masks.given_folder", masks.given_folder, check_exists),
        ("masks.labels_folder", masks.labels_folder, check_exists),
        ("train.dino", train.dino, check_exists),
        ("train.concept_names", train.concept_names, names_of),
        ("evaluate.names", evaluate.names, lambda names: benchmark_names(names, "voc")),  # of a file, any kind
        ("evaluate.masks_folder", evaluate.masks_folder if evaluate.masks == "given" else "", check_exists),
        ("train.clip", train.clip, check_clip),
        ("evaluate.clip", evaluate.clip, check_clip),
    ]
    errors = []
    for name, value, check in looked_at:
        try:
            if value:
                check(value)
        except ValueError as error:
            errors.append(f"{name}: {error}")
    if not errors:
        try:
            _check_sides(train, evaluate)
        except ValueError as error:
            errors.append(str(error))
    return errors


def _check_sides(train: TrainConfig, evaluate: EvaluateConfig) -> None:
    """Raise ValueError if the images of a stage cannot be cut into the patches of its CLIP."""
    from pixelclip.models.backbone import check_multiple
    from pixelclip.models.clip_checks import patch_of

    for clip in dict.fromkeys((train.clip, evaluate.clip or train.clip)):
        if not (patch := patch_of(clip)):
            continue
        if clip == train.clip:
            check_multiple("train.side", train.side, patch)
        if evaluate.protocol != "slide":
            check_multiple("evaluate.side", evaluate.side or train.side, patch)
