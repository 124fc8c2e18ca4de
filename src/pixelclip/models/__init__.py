"""CLIP's two towers, PixelCLIP, and its checkpoints."""
