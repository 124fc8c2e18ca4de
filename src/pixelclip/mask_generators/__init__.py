"""Class-agnostic masks of an image."""
