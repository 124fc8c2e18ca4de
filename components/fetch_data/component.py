"""KFP components of stage fetch_data, for data and for a labelled set: KFP's graph shows only the name of an output."""

from typing import NamedTuple

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def fetch_data(
    repo: str,
    path: str,
    revision: str,
    data: dsl.Output[dsl.Dataset],
    settings: dict,
    fetch: str = "",
    workspace: str = "",
) -> NamedTuple("Fetched", [("version", str)]):
    """Fetch data from a DVC repository, or point to existing data. `fetch` is part of KFP's cache key."""
    from pixelclip_pipelines.steps import fetched

    return (fetched(data, repo, path, revision, settings, workspace),)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def fetch_labelled(
    repo: str,
    path: str,
    revision: str,
    labelled: dsl.Output[dsl.Dataset],
    settings: dict,
    fetch: str = "",
    workspace: str = "",
) -> NamedTuple("Fetched", [("version", str)]):
    """Fetch a labelled set as `fetch_data` fetches data."""
    from pixelclip_pipelines.steps import fetched

    return (fetched(labelled, repo, path, revision, settings, workspace),)
