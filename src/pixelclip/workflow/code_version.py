"""Version of the running code: git revision and container image."""

import os
import shutil
import subprocess
from pathlib import Path

import pixelclip

UNKNOWN, CHANGED = "unknown", "+changes"
"""Revision outside a git checkout; suffix of a revision with uncommitted changes."""


def code_revision() -> str:
    """Return the git revision of this code, with the suffix `CHANGED` if it has uncommitted changes.

    PIXELCLIP_REVISION overrides it. Code that git does not track has the revision `UNKNOWN`.
    """
    if revision := os.environ.get("PIXELCLIP_REVISION"):
        return revision
    package = Path(pixelclip.__file__).parent
    git = shutil.which("git")
    if git is None:
        return UNKNOWN
    tracked = subprocess.run([git, "ls-files", "--error-unmatch", pixelclip.__file__], cwd=package, capture_output=True)
    if tracked.returncode:  # an installed package, possibly inside another repository
        return UNKNOWN
    head = subprocess.run([git, "rev-parse", "HEAD"], cwd=package, capture_output=True, text=True)
    changed = subprocess.run([git, "diff", "--quiet", "HEAD", "--", "."], cwd=package, capture_output=True)
    return head.stdout.strip() + (CHANGED if changed.returncode else "") if head.returncode == 0 else UNKNOWN


def code_image() -> str:
    """Return the container image of this process, a tag or digest (PIXELCLIP_IMAGE); empty outside containers."""
    return os.environ.get("PIXELCLIP_IMAGE", "")
