"""Painted scenes and the small CLIP that was trained on their captions."""
