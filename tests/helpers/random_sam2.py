"""Random weights and the reduced size whose features are in tests/golden/sam2_encoder.npz."""

import torch

from pixelclip.mask_generators.sam2_encoder import HieraSize

# 128 px give maps of 32, 16, 8 and 4: windows of 3 and 6 need padding.
REDUCED = HieraSize(8, 1, (1, 2, 3, 2), (4,), windows=(8, 4, 6, 3), background=5)
WIDTH = 16


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Fill a module with random weights that depend only on the names and shapes of its tensors."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted(module.requires_grad_(False).state_dict().items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1:
            tensor.copy_(noise * 0.1 + ("norm" in name and name.endswith("weight")))
        else:
            tensor.copy_(noise * 2 / tensor[0].numel() ** 0.5)
    return module.eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
