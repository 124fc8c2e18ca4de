"""Segment images by class names."""
