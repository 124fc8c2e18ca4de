"""KFP component that pins the commit of the data and the version of the CLIP."""

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
    """Resolve a revision of a DVC repository to a commit, and the name of a CLIP to the version of its weights."""
    from pixelclip_pipelines.steps import pinned, pinned_clip

    return (*pinned(repo, revision, workspace), *pinned_clip(clip, settings, workspace))
