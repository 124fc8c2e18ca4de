"""Evaluation of a model while it trains: mIoU on a small labelled set, and the best checkpoint so far."""

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, FiniteFloat, PositiveInt

from pixelclip.config import EvaluateConfig, TrainConfig
from pixelclip.data.labelled_sets import open_labelled
from pixelclip.distributed import ProcessGroup, pick_precision
from pixelclip.evaluation.confusion import OURS
from pixelclip.evaluation.evaluator import TowerEvaluation, evaluate_towers
from pixelclip.evaluation.protocol import parse_labelled_sets
from pixelclip.models.backbone import Backbone
from pixelclip.models.checkpoint import CONFIG, WEIGHTS, Clip
from pixelclip.models.pixelclip import PixelCLIP
from pixelclip.models.text import classifier
from pixelclip.models.tokenizer import TOKENIZER_FILES
from pixelclip.storage.files import digest, read_json, write_json
from pixelclip.workflow.stage import PROVENANCE

BEST = "best"
"""Folder in a model folder: the model at the step with the highest mIoU, itself a model folder."""
_PICTURES = 4


class _Best(BaseModel):
    step: PositiveInt
    miou: FiniteFloat
    labelled: str


class TrainingEvaluation:
    """Evaluation during training, in the main process; the labels decide only which step is kept as `BEST`.

    The protocol is that of stage `evaluate` with default settings and the side of the training.

    Args:
        config: settings of the training, with `evaluate_on`.
        clip: the CLIP in training.
        model: the model in training; its student is the image tower of `clip`.
        folder: model folder; an interrupted training continues with its best model.
        device: device of the model.

    Raises:
        ValueError: the labelled set cannot be used.
    """

    def __init__(self, config: TrainConfig, clip: Clip, model: PixelCLIP, folder: Path, device: torch.device) -> None:
        settings = EvaluateConfig(side=config.side, pictures=_PICTURES)
        ((self.name, (path, self._settings)),) = parse_labelled_sets([config.evaluate_on], settings).items()
        self._dataset = open_labelled(path, self._settings.kind)
        self.classes = self._dataset.classes
        self._classifier = classifier(model.text, self.classes).to(device)
        self._config, self._clip, self._model, self._group = config, clip, model, ProcessGroup(device=device)
        self._folder, self._file = folder / BEST, folder / BEST / "best.json"

    def run(self, step: int, save: Callable[[Path], None]) -> tuple[float, TowerEvaluation]:
        """Evaluate the model after `step` steps and keep it if it is the best; the model is in training mode afterwards.

        Args:
            step: completed steps.
            save: writes the model to a folder.

        Returns:
            mIoU in percent, and the evaluation with its examples.
        """
        towers = {OURS: Backbone(self._clip.model.visual, self._config.residual)}  # has its own precision
        with tempfile.TemporaryDirectory() as state:
            found = evaluate_towers(
                towers,
                self._clip,
                self._classifier,
                self._dataset,
                self._settings,
                self._group,
                Path(state),
                "train: evaluation",
            )
        pick_precision(self._config.precision, self._group.device)  # the evaluation has switched TF32 off
        self._model.train()
        confusion = found.counts.confusions[OURS]
        if not confusion.counts.any():
            raise ValueError(f"train.evaluate_on {self._config.evaluate_on}: the label maps contain no labelled pixel")
        miou = confusion.miou()
        former = read_json(self._file, _Best) if self._file.is_file() else {}
        if former.get("labelled") != self.name or miou > former["miou"]:  # another set's mIoU says nothing about this one's
            self._folder.mkdir(exist_ok=True)
            save(self._folder)
            write_json(self._file, {"step": step, "miou": miou, "labelled": self.name})
        return miou, found

    def finish(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """Complete the folder of the best model with its provenance.

        Returns:
            Its `step`, `miou` and `labelled`; empty without any evaluation, because every such step had no mask.
        """
        if not self._file.is_file():
            return {}
        best = dict(read_json(self._file, _Best))
        files = [self._folder / name for name in (WEIGHTS, CONFIG, *TOKENIZER_FILES) if (self._folder / name).is_file()]
        finished = {"output": digest(self._folder, files), "finished": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(self._folder / PROVENANCE, {**provenance, "best": best, **finished})
        return best
