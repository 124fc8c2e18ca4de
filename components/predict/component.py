"""KFP component of `predict`."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def predict(
    images: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    predictions: dsl.Output[dsl.Artifact],
    classes: str,
    quality: str,
    overlays: bool,
    label_studio: bool,
    max_bad_share: float,
    part: str = "",
    workspace: str = "",
):
    """Segment images, or one part of them, into the given classes."""
    from pixelclip import api
    from pixelclip.data.class_names import names_of
    from pixelclip_pipelines.artifacts import located, pack, place, record

    out = place(predictions, workspace, f"predict/{part.replace('/', '-of-')}")
    settings = {"quality": quality, "overlays": overlays, "label_studio": label_studio, "max_bad_share": max_bad_share}
    record(predictions, api.predict(located(images), names_of(classes), located(model), out, part=part, **settings))
    pack(predictions)
