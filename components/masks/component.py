"""KFP component of stage masks."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def masks(
    shards: dsl.Input[dsl.Dataset],
    masks: dsl.Output[dsl.Dataset],
    generator: str,
    settings: dict,
    part: str = "",
    workspace: str = "",
):
    """Generate class-agnostic masks for every image of the shards, or of one part of them."""
    from pixelclip.masks import run
    from pixelclip.settings import load
    from pixelclip_pipelines.artifacts import located, place, record

    config = load("masks", overrides={**settings, "masks.generator": generator, "masks.part": part})
    out = place(masks, workspace, f"masks/{part.replace('/', '-of-')}")
    record(masks, run(located(shards), out, config))
