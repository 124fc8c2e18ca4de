"""Cost of `quality=best`, PAMR and propagation in forward passes of a ViT-B/16 at 320 px; run `python -m bench.refinement`."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bench.train_step import SIDE, random_clip
from pixelclip.config import QUALITIES
from pixelclip.inference.refinement.pamr import pamr
from pixelclip.inference.refinement.propagation import propagate
from pixelclip.inference.refinement.refine import View, photo_scores
from pixelclip.models.backbone import Backbone

CLASSES, GRID, ROUNDS = 21, 64, 5


def main() -> None:
    """Print the median ratio of each step to one pass, over rounds that alternate all of them."""
    generator = torch.Generator().manual_seed(0)
    backbone = Backbone(random_clip().visual).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (480, 480, 3), np.uint8)
    photo = Image.fromarray(pixels).resize((640, 480))
    classes = F.normalize(torch.randn(CLASSES, 512, generator=generator), dim=-1)
    view = View(SIDE, SIDE, GRID, 0, 0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    image = torch.rand(1, 3, SIDE, SIDE, generator=generator)
    scores, small = torch.rand(1, CLASSES, GRID, GRID, generator=generator), torch.rand(1, 3, GRID, GRID, generator=generator)
    steps: dict[str, Callable[[], object]] = {
        "one pass": lambda: backbone(image),
        "quality=fast": lambda: photo_scores(backbone, photo, classes, view, QUALITIES["fast"]),
        "quality=best": lambda: photo_scores(backbone, photo, classes, view, QUALITIES["best"]),
        "PAMR": lambda: pamr(scores, small, QUALITIES["best"].pamr_iterations),
        "propagation": lambda: propagate(scores, small, 3.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with torch.no_grad():
        for turn in range(ROUNDS + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        ratio = statistics.median(value / one for value, one in zip(values, seconds["one pass"], strict=True))
        print(f"{name:<14} {statistics.median(values):7.3f} s  {ratio:6.2f} passes")


if __name__ == "__main__":
    main()
