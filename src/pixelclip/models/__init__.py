"""CLIP's towers, PixelCLIP and its checkpoints."""
