"""Painted scenes, and the toy CLIP trained on their captions."""
