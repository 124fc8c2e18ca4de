"""mIoU of refinements at inference against their cost: `python -m bench.quality_cost LABELLED MODEL [MODEL ...]`.

The models differ in their training's seed. Settings alternate on every image, so that other load on the machine meets all of
them. Writes `bench/quality_cost.json` and `docs/pictures/quality_cost.png`.
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from pixelclip.config import QUALITIES, Refinement
from pixelclip.data.labelled_images import LabelledSet
from pixelclip.data.labelled_sets import open_labelled
from pixelclip.evaluation.confusion import ConfusionMatrix
from pixelclip.inference.label_map import label_map
from pixelclip.inference.predictor import Predictor
from pixelclip.inference.refinement.refine import photo_scores
from pixelclip.models.text import TEMPLATES, classifier

RESULTS = Path(__file__).with_name("quality_cost.json")
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "quality_cost.png"
PAMR = QUALITIES["best"].pamr_iterations
FAST = "single view, 144 px (fast)"
SETTINGS: dict[str, tuple[int, Refinement]] = {
    "single view, 96 px": (96, Refinement()),
    FAST: (144, Refinement()),
    "single view, 192 px": (192, Refinement()),
    "mirrored": (144, Refinement(flip=True)),
    "propagation 3": (144, Refinement(propagation=3)),
    "Felzenszwalb vote": (144, Refinement(segments="felzenszwalb")),
    "PAMR": (144, Refinement(pamr_iterations=PAMR)),
    "windows 1.5": (144, Refinement(scales=[1.5])),
    "windows 1.5, PAMR": (144, Refinement(scales=[1.5], pamr_iterations=PAMR)),
    "windows 1.25, 1.75": (144, Refinement(scales=QUALITIES["best"].scales)),
    "windows 1.25, 1.75, PAMR (best)": (144, QUALITIES["best"]),
    "windows 1.25, 1.5, 2, PAMR": (144, Refinement(scales=[1.25, 1.5, 2], pamr_iterations=PAMR)),
    "windows 1.25, 1.75, mirrored, PAMR": (144, QUALITIES["best"].model_copy(update={"flip": True})),
}
"""Side of the single view in pixels, and refinement; a window has the side of the training."""


@torch.no_grad()
def _measure(predictor: Predictor, labelled: LabelledSet) -> dict[str, tuple[float, float]]:
    """Return mIoU and milliseconds an image (median) of every setting."""
    classes = classifier(predictor.text, labelled.classes, TEMPLATES["ensemble"])
    confusion = {name: ConfusionMatrix.zeros(len(labelled.classes)) for name in SETTINGS}
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for index in range(len(labelled)):
        photo, truth = labelled.read(index)
        for name, (side, refinement) in SETTINGS.items():
            view = replace(predictor.view, side=side, shortest_edge=0, longest_edge=0)
            start = time.perf_counter()
            scores = photo_scores(predictor.backbone, photo, classes, view, refinement)
            labels = label_map(scores, (photo.height, photo.width))[0]
            seconds[name].append(time.perf_counter() - start)
            confusion[name].add(truth, labels)
    return {name: (confusion[name].miou(), 1000 * statistics.median(seconds[name])) for name in SETTINGS}


def _draw(rows: Sequence[Mapping[str, Any]]) -> None:
    figure = Figure(figsize=(10, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    costs = [row["passes"] for row in rows]
    for key, colour, label in (("pixelclip", "#1f5fa8", "PixelCLIP, three seeds"), ("clip", "#999999", "plain CLIP")):
        means = [statistics.mean(row[key]) for row in rows]
        below = [mean - min(row[key]) for mean, row in zip(means, rows, strict=True)]
        above = [max(row[key]) - mean for mean, row in zip(means, rows, strict=True)]
        axes.errorbar(costs, means, yerr=[below, above], fmt="o", color=colour, capsize=3, label=label)
        for number, (cost, mean) in enumerate(zip(costs, means, strict=True), start=1):
            axes.annotate(str(number), (cost, mean), xytext=(5, 3), textcoords="offset points", fontsize=9)
    names = "\n".join(f"{number}  {row['name']}" for number, row in enumerate(rows, start=1))
    axes.text(1.02, 1, names, transform=axes.transAxes, va="top", fontsize=9, linespacing=1.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := [1, 2, 4], [str(tick) for tick in ticks])
    axes.set_xlim(0.8 * min(costs), 1.25 * max(costs))
    axes.set_xlabel("time per image relative to quality=fast")
    axes.set_ylabel("mIoU on 200 painted scenes")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(PICTURE)


def main(labelled: str, *models: str) -> None:
    """Measure every setting with every model and its CLIP, print a table, and write both files."""
    opened = open_labelled(Path(labelled))
    ours = [_measure(Predictor.load(Path(model), "cpu"), opened) for model in models]
    clip = _measure(Predictor.load(Path(models[0]), "cpu", original_clip=True), opened)
    rows = []
    for name in SETTINGS:
        milliseconds = [found[name][1] for found in (*ours, clip)]
        passes = statistics.median(found[name][1] / found[FAST][1] for found in (*ours, clip))
        miou = {"pixelclip": [found[name][0] for found in ours], "clip": [clip[name][0]]}
        rows.append({"name": name, "milliseconds": statistics.median(milliseconds), "passes": passes, **miou})
        seeds = "  ".join(f"{value:.1f}" for value in miou["pixelclip"])
        mean = statistics.mean(miou["pixelclip"])
        print(
            f"{name:<36}{mean:6.1f}  ({seeds})  CLIP {clip[name][0]:5.1f} {milliseconds[0]:8.1f} ms  x {passes:.2f}", flush=True
        )
    RESULTS.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n")
    _draw(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
