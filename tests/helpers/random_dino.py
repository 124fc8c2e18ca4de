"""Images and random weights of a small DINO."""

import torch

PATCH, GRID, WIDTH, DEPTH = 4, 5, 128, 2


def weights(width=WIDTH, depth=DEPTH, patch=PATCH, grid=GRID, seed=0):
    """Create the state dict of a random ViT with the names that timm and Meta share."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid**2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
    return {name: torch.randn(shape, generator=generator) * 0.15 for name, shape in shapes.items()}


def images(*size, seed=1):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))
