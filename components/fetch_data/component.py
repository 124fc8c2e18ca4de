"""KFP component of stage fetch_data."""

from typing import NamedTuple

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def fetch_data(
    repo: str,
    path: str,
    revision: str,
    data: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    settings: dict,
    fetch: str = "",
    workspace: str = "",
) -> NamedTuple("Fetched", [("version", str)]):
    """Fetch data from a DVC repository, or point to existing data. `fetch` is part of KFP's cache key."""
    from pixelclip_pipelines.steps import fetched

    values, version = fetched(data, repo, path, revision, settings, workspace)
    for name, value in values.items():
        metrics.log_metric(name, value)
    return (version,)
