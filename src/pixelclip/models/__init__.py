"""CLIP's towers, PixelCLIP and its checkpoints."""

from pixelclip.models.compiler import without_compiler

with without_compiler():
    import open_clip  # noqa: F401  (imports torchvision and timm)
