"""KFP component of stage register."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    model: dsl.Input[dsl.Model],
    registration: dsl.Output[dsl.Artifact],
    links: dsl.Output[dsl.Markdown],
    registry_name: str,
    min_gain: float,
    settings: dict,
    evaluation: dsl.Input[dsl.Artifact] = None,
    workspace: str = "",
):
    """Register a model in MLflow and decide whether it becomes champion; without an evaluation it is unmeasured."""
    from pathlib import Path

    from pixelclip.register import run
    from pixelclip.settings import load
    from pixelclip_pipelines.artifacts import located, place, record
    from pixelclip_pipelines.steps import links as page

    chosen = {"register.name": registry_name, "register.min_gain": min_gain}
    # In one workspace, a model can first be registered without an evaluation, and later with one.
    out = place(registration, workspace, (evaluation and "register") or "register_unmeasured")
    config = load("register", overrides={**settings, **chosen})
    record(registration, run(located(model), evaluation and located(evaluation), out, config))
    Path(links.path).write_text(page(out, located(evaluation or model)))
