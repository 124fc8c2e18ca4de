"""Export a model for other programs: open_clip, the Hugging Face hub, ONNX."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import yaml

from pixelclip.storage.files import check_writable, write_atomically
from pixelclip.workflow.failures import first_line

if TYPE_CHECKING:
    from torch import nn

Format = Literal["open_clip", "huggingface", "onnx"]
CARD = "README.md"
_OPEN_CLIP = """
## The files in this folder

They are the CLIP with the trained image tower, in open_clip's format; `pixelclip` above reads the original model folder.

```python
import open_clip

model = open_clip.create_model("local-dir:FOLDER")  # or "hf-hub:USER/NAME"
```
"""
_TOLERANCE = 0.005  # of ONNX's values, relative to the largest one


def run(
    model: Path,
    out: Path,
    kind: str = "open_clip",
    classes: Sequence[str] = (),
    evaluation: Path | None = None,
    uri: str = "",
    licences: Mapping[str, str] | None = None,
) -> list[Path]:
    """Export a model folder.

    Args:
        model: model folder.
        out: folder to write; its files must not exist yet.
        kind: `open_clip` (config and weights), `huggingface` (the same with a model card) or `onnx`.
        classes: class names for `onnx`, whose output is then their scores.
        evaluation: output of `evaluate` for this model, whose scores the model card of `huggingface` shows.
        uri: how users of pixelclip load the model, for the model card; by default the name of the model folder.
        licences: `licence` of the weights and `data_licence` of the training images, for the model card.

    Returns:
        The files written.

    Raises:
        ValueError: not a model folder, an unknown format, classes, an evaluation or licences for another format, an evaluation
            of another model, or `out` already contains an export.
    """
    if kind not in get_args(Format):
        raise ValueError(f"format {kind!r}: must be {', '.join(get_args(Format))}")
    if classes and kind != "onnx":
        raise ValueError(f"--classes is for --format onnx; {kind} exports the text tower, which encodes any class names")
    if evaluation and kind != "huggingface":
        raise ValueError(f"--evaluation is for --format huggingface; {kind} has no model card")
    if licences and kind != "huggingface":
        raise ValueError(f"--licence and --data-licence are for --format huggingface; {kind} has no model card")
    before = set(out.iterdir()) if out.is_dir() else set()
    if kind == "onnx":
        _write_onnx(model, out, classes)
    else:
        from pixelclip.models.convert import export

        if kind == "huggingface" and (out / CARD).exists():
            raise ValueError(f"{out}: {CARD} already exists; remove it or choose another folder")
        card = _card(model, evaluation, name=out.resolve().name, uri=uri, **licences or {}) if kind == "huggingface" else ""
        export(model, out)
        if card:
            write_atomically(out / CARD, card)
    return sorted(set(out.iterdir()) - before)


def _card(model: Path, evaluation: Path | None, **facts: str) -> str:
    from pixelclip.evaluation.protocol import check_evaluation
    from pixelclip.registry.model_card import model_card

    if evaluation:
        check_evaluation(evaluation, model)
    return _front_matter() + model_card(model, evaluation, **facts) + _OPEN_CLIP


def _front_matter() -> str:
    """Return the fields that the Hugging Face hub reads from a model card; the licence is the user's to add."""
    fields = {"library_name": "open_clip", "pipeline_tag": "zero-shot-image-classification", "tags": ["clip", "pixelclip"]}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n\n"


def _write_onnx(model: Path, out: Path, classes: Sequence[str]) -> None:
    """Write the image tower to `model.onnx`: normalised images [B, 3, side, side] to dense features or scores of the classes.

    The output is `features` [B, C, h, w], not normalised, or with classes `scores` [B, K, 64, 64], cosines. B is dynamic.
    """
    import torch

    from pixelclip.inference.onnx_predictor import METADATA, ONNX, OnnxMetadata, metadata_json
    from pixelclip.inference.prediction import inference_settings
    from pixelclip.inference.scores import class_scores
    from pixelclip.models.checkpoint import backbone_of, load_model
    from pixelclip.models.text import classifier

    file = out / ONNX
    check_writable(file)
    if file.exists():
        raise ValueError(f"{out}: {ONNX} already exists; remove it or choose another folder")
    _check_packages()
    loaded = load_model(model)
    settings = inference_settings(model)
    side = settings.side or loaded.side
    backbone = backbone_of(loaded).eval().requires_grad_(False)
    weights = classifier(loaded.clip.text_tower().eval(), classes) if classes else None

    class Exported(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone
            self.weights: torch.Tensor
            self.register_buffer("weights", weights)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.backbone(images) if weights is None else class_scores(self.backbone, images, self.weights)

    exported = Exported().eval()
    example = torch.zeros(2, 3, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter about its own code
        program = torch.onnx.export(
            exported,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["scores" if classes else "features"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    metadata = OnnxMetadata(
        format=1,
        side=side,
        mean=list(loaded.clip.mean),
        std=list(loaded.clip.std),
        shortest_edge=settings.shortest_edge,
        longest_edge=settings.longest_edge,
        classes=list(classes),
    )
    assert program is not None  # with dynamo=True
    program.model.metadata_props[METADATA] = metadata_json(metadata)
    temporary = out / f".{ONNX}.partial"
    try:
        program.save(temporary, external_data=False)
        _check_values(temporary, exported, side)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _check_values(file: Path, exported: "nn.Module", side: int) -> None:
    """Raise ValueError unless onnxruntime computes what torch does, for a batch of another size than in the export."""
    import onnxruntime
    import torch

    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = exported(images)
    try:
        found = torch.from_numpy(onnxruntime.InferenceSession(str(file)).run(None, {"images": images.numpy()})[0])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise ValueError(f"this model cannot be exported to ONNX: {first_line(error)}") from None
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise ValueError(f"this model cannot be exported to ONNX: values differ from torch's by up to {difference:.2%}")


def _check_packages() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--format onnx needs the extra `onnx` (pip install 'pixelclip[onnx]'): {error.name} is missing"
        ) from None
