"""KFP component of stage fetch_data."""

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
    workspace: str = "",
):
    """Fetches data out of a DVC repository, or points to data that are there already."""
    from pixelclip_pipelines.steps import fetched

    for name, value in fetched(data, repo, path, revision, settings, workspace).items():
        metrics.log_metric(name, value)
