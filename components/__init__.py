"""KFP components, one folder per step. A component imports the installed package and calls the stage."""

import os

IMAGE = os.environ.get("PIXELCLIP_IMAGE", "pixelclip:dev")
"""Container image of every component, chosen at compile time: a tag in development, a digest in production."""
