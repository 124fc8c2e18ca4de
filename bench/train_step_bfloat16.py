"""`train_step` with pixelclip in bfloat16, which `precision=auto` selects on devices that support it in hardware."""

import torch

from bench import train_step
from bench.case import Case


def make() -> Case:
    """Create the comparison; bfloat16 may assign a mask to a different concept, so loss and norm agree only roughly."""
    return train_step.make(torch.bfloat16, tolerance=2e-2)
