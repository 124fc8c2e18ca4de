"""URLs of MLflow's pages.

MLflow's pages show either GenAI or model training. They do not read the experiment's tag `mlflow.experimentKind`: the parameter
`workflowType` of the URL decides, then what was last chosen in this browser, then GenAI. Hence each URL has the parameter.
"""

_TRAINING = "workflowType=machine_learning"


def for_training(url: str) -> str:
    """Return the URL of one of MLflow's pages (`ADDRESS/#/...`) so that it opens as model training."""
    if "#" not in url or "workflowType=" in url:
        return url
    return f"{url}{'&' if '?' in url.partition('#')[2] else '?'}{_TRAINING}"


def run_page(address: str, run_id: str, experiment_id: str) -> str:
    """Return the URL of a run's page. Without an experiment MLflow redirects it and drops the parameter."""
    experiment = f"experiments/{experiment_id}/" if experiment_id else ""
    return for_training(f"{address}/#/{experiment}runs/{run_id}")


def experiment_page(address: str, experiment_id: str) -> str:
    """Return the URL of an experiment's page."""
    return for_training(f"{address}/#/experiments/{experiment_id}")


def version_page(address: str, name: str, version: int) -> str:
    """Return the URL of the page of a registered model's version."""
    return for_training(f"{address}/#/models/{name}/versions/{version}")
