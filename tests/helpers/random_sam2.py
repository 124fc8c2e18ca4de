"""Random weights of a reduced SAM 2; what sam2 1.1.0 computes with them is in tests/golden/sam2_*.npz."""

import numpy as np
import torch

from pixelclip.mask_generators.sam2 import Sam2
from pixelclip.mask_generators.sam2_encoder import HieraSize

# 128 px give maps of 32, 16, 8 and 4: windows of 3 and 6 need padding.
REDUCED = HieraSize(8, 1, (1, 2, 3, 2), (4,), windows=(8, 4, 6, 3), background=5)
WIDTH, SIDE = 16, 128

# Random weights give masks all over the image: their boxes are the same.
ALL = {
    "points_per_side": 3,
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "stability_score_offset": 0.3,
    "box_nms_thresh": 1.0,
}
SETTINGS = {
    "all": ALL,
    "thresholds": ALL | {"points_per_side": 4, "pred_iou_thresh": 0.6, "stability_score_thresh": 0.72},
    "suppression": ALL | {"box_nms_thresh": 0.99},
}


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Fill a module with random weights that depend only on the names and shapes of its tensors."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted(module.requires_grad_(False).state_dict().items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1:
            tensor.copy_(noise * 0.1 + name.endswith("weight"))
        else:
            tensor.copy_(noise * 2 / tensor[0].numel() ** 0.5)
    return module.eval()


def make_sam2() -> Sam2:
    sam = fill(Sam2(REDUCED, WIDTH, SIDE))
    for name, tensor in sam.sam_mask_decoder.state_dict().items():
        if tensor.ndim > 1:
            tensor.mul_(0.5)  # saturates no predicted IoU
        elif "output_hypernetworks_mlps" in name and name.endswith("layers.2.bias"):
            tensor.sub_(-0.6)  # balances masks and background
    return sam


def images() -> torch.Tensor:
    return torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))


def photos() -> list[np.ndarray]:
    """Noise at several scales, smaller and larger than the encoder's input."""
    random = np.random.default_rng(0)
    found = []
    for height, width in ((96, 160), (300, 200)):
        coarse = random.integers(0, 200, (height // 20, width // 20, 3)).repeat(20, axis=0).repeat(20, axis=1)
        coarse = np.pad(coarse, ((0, height - len(coarse)), (0, 0), (0, 0)), mode="edge")
        found.append((coarse + random.integers(0, 56, coarse.shape)).astype(np.uint8))
    return found
