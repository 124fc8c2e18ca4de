"""KFP component of stage shards."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def shards(
    images: dsl.Input[dsl.Dataset],
    shards: dsl.Output[dsl.Dataset],
    settings: dict,
    workspace: str = "",
):
    """Pack a folder of images into tar shards."""
    from pixelclip.settings import load
    from pixelclip.shards import run
    from pixelclip_pipelines.artifacts import located, place, record

    config = load("shards", overrides=settings)
    record(shards, run(located(images), place(shards, workspace, "shards"), config))
