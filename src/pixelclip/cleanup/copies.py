"""Copies in the cache. They can be downloaded again, so only their last use counts."""

import math
from dataclasses import replace
from functools import partial

from pixelclip.cleanup import workspaces
from pixelclip.cleanup.named import Named
from pixelclip.cleanup.policy import Item
from pixelclip.storage import cache
from pixelclip.storage.files import TRASH


def items() -> list[Item]:
    """Return all versions of all URIs in the cache, and what stages have not uploaded yet, which is `resumable`."""
    copies = list(cache.copies())
    found = [
        Item(
            name=cache.origin(copy.folder / "content"),
            size=copy.size,
            changed=copy.used,
            delete=partial(cache.remove, copy),
            resumable=copy.unfinished,
            leftover=bool(TRASH.fullmatch(copy.folder.name)),
        )
        for copy in copies
        if copy.folder.name != cache.OUT
    ]
    folders = [copy.folder for copy in copies if copy.folder.name == cache.OUT]
    # What is newer than its provenance here was copied back from the store, since nobody edits the cache by hand.
    outputs = workspaces.items(folders, Named(), tolerance=math.inf)
    return [*found, *(replace(item, resumable=True) for item in outputs)]
