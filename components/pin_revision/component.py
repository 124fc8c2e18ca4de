"""KFP component of the revision of the data."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pin_revision(repo: str, revision: str) -> str:
    """Says which commit a revision of a DVC repository is now."""
    from pixelclip_pipelines.steps import pinned

    return pinned(repo, revision)
