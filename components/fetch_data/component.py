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
    """Fetches data out of a DVC repository, or points to data that are there already; by `fetch` KFP knows it again."""
    from pixelclip_pipelines.steps import fetched

    figures, version = fetched(data, repo, path, revision, settings, workspace)
    for name, value in figures.items():
        metrics.log_metric(name, value)
    return (version,)
