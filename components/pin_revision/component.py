"""KFP component that checks the parameters of a run, and pins the commit of the data and the version of the CLIP."""

from typing import NamedTuple, Optional

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pin_revision(
    data_images: str,
    data_repo: str,
    data_revision: str,
    masks_generator: str,
    train_clip: str,
    train_steps: int,
    train_batch_size: int,
    train_concepts: int,
    train_seed: int,
    register_name: str,
    register_min_gain: float,
    settings: str,
    settings_file: str,
    workspace: str,
    data_labelled: Optional[str] = None,  # noqa: UP045
    volume: str = "/",
    nodes: int = 1,
    gpus: int = 0,
) -> NamedTuple(
    "Pinned",
    [
        ("commit", str),
        ("fetch", str),
        ("clip_version", str),
        ("clip_settings", dict),
        ("stage_settings", dict),
        ("generator", str),
        ("clip", str),
        ("steps", int),
        ("batch_size", int),
        ("concepts", int),
        ("seed", int),
        ("registry_name", str),
        ("min_gain", float),
    ],
):
    """Check all parameters of a run, and resolve data revision, CLIP and settings for the other steps."""
    form = dict(locals())
    from pixelclip_pipelines.first_step import check_and_pin

    return check_and_pin(form, volume, nodes, gpus)
