"""What KFP's pages show of a pipeline: a menu, a table of parameters, and the names of artifacts. kfp cannot set them."""

from typing import Any, get_args

from kfp import dsl

from pixelclip.config import STAGES
from pixelclip_pipelines.parameters import SETTING_OF

ARTIFACTS = {
    "data": "Data",
    "labelled": "Labelled set",
    "shards": "Shards",
    "masks": "Masks",
    "model": "PixelCLIP model",
    "clip_evaluation": "Evaluation of CLIP",
    "evaluation": "Evaluation of PixelCLIP",
    "metrics": "Metrics to compare",
    "confusion": "Confusion matrix",
    "report": "Report",
    "registration": "Registration",
    "links": "Links to MLflow and data versions",
    "predictions": "Predictions",
    "table": "Table of the sweep",
    "plot": "Plot of the sweep",
}
"""Names of the output artifacts in KFP's pages."""
_TITLE = "display_name"  # KFP's key; its graph shows the output's own name


def label(pipeline: dsl.base_component.BaseComponent) -> dsl.base_component.BaseComponent:
    """Add menus, the table of parameters and the names of artifacts to a pipeline, and return it.

    kfp 2.17 has no Python notation for them, but the compiled format and KFP 2.17's pages do.
    """
    spec = pipeline.component_spec.implementation.graph
    parameters = spec.root.input_definitions.parameters
    for name, setting in SETTING_OF.items():
        stage, _, field = setting.partition(".")
        choices = [each for each in get_args(STAGES[stage].model_fields[field].annotation) if isinstance(each, str)]
        for choice in choices if name in parameters else ():
            parameters[name].literals.add().string_value = choice
    for component in spec.components.values():
        if component.executor_label:
            for name, output in component.output_definitions.artifacts.items():
                output.metadata[_TITLE] = ARTIFACTS[name]
    rows = ["| parameter | default | meaning |", "|---|---|---|"]
    for name in sorted(parameters):
        entry = parameters[name]
        entry.description = " ".join(entry.description.split())
        default = _plain(entry.default_value) if entry.HasField("default_value") else "required"
        rows.append(f"| `{name}` | {default} | {entry.description} |")
    spec.pipeline_info.description = f"{pipeline.description}\n\n" + "\n".join(rows)
    return pipeline


def _plain(value: Any) -> str:
    """Write a default as one types it into the form, as Markdown."""
    plain = getattr(value, value.WhichOneof("kind"))
    text = f"{plain:g}" if isinstance(plain, float) else str(plain)
    return f"`{text}`" if text else "empty"


def described(pipeline: dsl.base_component.BaseComponent) -> str:
    """Return the description of a pipeline, with the table of its parameters."""
    return str(pipeline.pipeline_spec.pipeline_info.description)
