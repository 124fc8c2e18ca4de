"""KFP component of what a run pins before it starts: the commit of its data, and its CLIP."""

from typing import NamedTuple

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pin_revision(
    repo: str,
    revision: str,
    clip: str,
    settings: dict,
    workspace: str = "",
) -> NamedTuple("Pinned", [("commit", str), ("fetch", str), ("clip_version", str), ("clip_settings", dict)]):
    """Says which commit a revision of a DVC repository is now, and which weights a CLIP's name means now."""
    from pixelclip_pipelines.steps import pinned, pinned_clip

    return (*pinned(repo, revision, workspace), *pinned_clip(clip, settings, workspace))
