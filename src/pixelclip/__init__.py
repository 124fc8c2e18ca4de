"""Open-vocabulary segmentation from images that nobody labelled (PixelCLIP, NeurIPS 2024)."""

__version__ = "0.1.0"
