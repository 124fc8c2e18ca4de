"""Search over ranges on a cluster: Katib's Experiment, the OptimizationJob of Kubeflow's SDK, whose trials are TrainJobs."""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client
from urllib3.exceptions import HTTPError

from pixelclip.commands.sweep_file import OBJECTIVE, Range, Search
from pixelclip.config import lasting
from pixelclip.settings import cut
from pixelclip_pipelines.cluster_config import Cluster, image_of, shared_folder
from pixelclip_pipelines.parameters import as_arguments, changed, check_batch, check_place, check_public, check_source
from pixelclip_pipelines.pods import core_api, reason_of_api
from pixelclip_pipelines.trainjob import template

GROUP, VERSION, PLURAL = "kubeflow.org", "v1beta1", "experiments"
_TIMEOUT = 10.0  # seconds per request
_NAME = 16  # characters of the sweep's name: Kubernetes adds to the names of an Experiment, a trial and a job
_QUOTES = set("'\"\\$`")


def manifest(
    name: str, search: Search, masks: str, labelled: str, workspace: str, cluster: Cluster, image: str = ""
) -> dict[str, Any]:
    """Return the Experiment of a search, checked by the models of Kubeflow's SDK.

    Args:
        name: name of the sweep.
        search: ranges, seeds and number of trials.
        masks, labelled: folders on the shared volume or s3:// prefixes.
        workspace: folder on the shared volume, in which every trial has a folder.
        cluster: a trial has the resources of step `train`, and the `parallel` of the cluster run at once.
        image: container image, see `image_of`.

    Raises:
        ValueError: an invalid place or setting, no shared volume, or kubeflow-katib-api is not installed.
    """
    try:
        from kubeflow_katib_api import models
    except ImportError:
        raise ValueError("a search on a cluster needs the extra `search` (pip install 'pixelclip[search]')") from None
    for option, place in {"masks": masks, "labelled": labelled}.items():
        check_source(option, place)
    if not workspace:
        raise ValueError("--workspace is missing: the folder on the shared volume in which every trial has a folder")
    check_place(workspace, shared_folder(cluster))
    check_public(search.configs)
    check_batch(search.configs["train"], 1, cluster.steps["train"].gpus)
    job = _trial(name, search, masks, labelled, workspace, template(cluster, 1, image_of(cluster, image)))
    identity = [masks, labelled, workspace, search.trials, search.seeds, *map(lasting, search.configs.values())]
    identity.append({setting: found.model_dump() for setting, found in search.ranges.items()})
    code = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    short = re.sub(r"[^a-z0-9]+", "-", name.casefold())[:_NAME].strip("-")
    # A parameter's name in ${trialParameters.NAME}; `trial` is the name that Katib gives the trial.
    parameters = [{"name": setting, "reference": setting} for setting in search.ranges]
    parameters.append({"name": "trial", "reference": "${trialSpec.Name}"})
    experiment = models.V1beta1Experiment.model_validate(
        {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "Experiment",
            "metadata": {"name": "-".join(part for part in ("pixelclip", short, code) if part)},
            "spec": {
                "objective": {"type": "maximize", "objectiveMetricName": OBJECTIVE},
                # The SDK reads only random and grid searches.
                "algorithm": {
                    "algorithmName": "random",
                    "algorithmSettings": [{"name": "random_state", "value": str(search.seeds[0])}],
                },
                "parameters": [_parameter(setting, found) for setting, found in search.ranges.items()],
                "maxTrialCount": search.trials,
                "parallelTrialCount": min(search.trials, cluster.parallel or search.trials),
                "trialTemplate": {
                    "retain": True,
                    "primaryContainerName": "node",
                    "trialParameters": parameters,
                    "trialSpec": job,
                },
            },
        }
    )
    return dict(experiment.to_dict())


def _parameter(setting: str, found: Range) -> dict[str, Any]:
    if found.choice:
        for choice in found.choice:
            if not isinstance(choice, str | int | float) or _QUOTES & set(str(choice)):
                raise ValueError(f"{setting}: choices on a cluster are numbers and texts without quotes (found {cut(choice)})")
        return {
            "name": setting,
            "parameterType": "categorical",
            "feasibleSpace": {"list": [str(each) for each in found.choice]},
        }
    low, high = found.values
    space = {"min": str(low), "max": str(high), "distribution": "logUniform" if found.log else "uniform"}
    return {"name": setting, "parameterType": "int" if isinstance(low, int) else "double", "feasibleSpace": space}


def _trial(name: str, search: Search, masks: str, labelled: str, workspace: str, job: dict[str, Any]) -> dict[str, Any]:
    """Return the TrainJob of a trial, in which Katib replaces `${trialParameters...}`."""
    fixed = {setting: value for setting, value in changed(search.configs).items() if setting not in search.ranges}
    fixed.pop("train.seed", None)
    chosen = [f"{setting}=${{trialParameters.{setting}}}" for setting in search.ranges]
    options = {
        "masks": masks,
        "labelled": labelled,
        "out": f"{workspace.rstrip('/')}/${{trialParameters.trial}}",
        "sweep": name,
    }
    options["seeds"] = ",".join(map(str, search.seeds))
    words = ["python3", "-m", "pixelclip_pipelines.trial"]
    words += [f"--{option}={value}" for option, value in options.items()]
    # Katib joins command and arguments by spaces for a shell, so they are quoted here.
    trainer = job["spec"]["trainer"] | {"command": ["sh", "-c"], "args": [shlex.join([*words, *as_arguments(fixed), *chosen])]}
    limit = job["spec"]["activeDeadlineSeconds"] * len(search.seeds)
    metadata = {"labels": job["metadata"]["labels"]}
    return job | {"metadata": metadata, "spec": job["spec"] | {"trainer": trainer, "activeDeadlineSeconds": limit}}


def write(path: Path, experiment: Mapping[str, Any]) -> None:
    """Write an Experiment for `kubectl apply -f`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(experiment), sort_keys=False))


def submit(experiment: Mapping[str, Any], cluster: Cluster) -> list[str]:
    """Create an Experiment unless it exists, and return its state as lines.

    Raises:
        ValueError: no kubeconfig; Kubernetes is unreachable or rejects the request.
    """
    core = core_api()
    if core is None:
        raise ValueError("no kubeconfig: set KUBECONFIG, or write the Experiment with compile-sweep")
    api, name = client.CustomObjectsApi(core.api_client), experiment["metadata"]["name"]
    place = {"group": GROUP, "version": VERSION, "namespace": cluster.namespace or "kubeflow", "plural": PLURAL}
    try:
        api.create_namespaced_custom_object(**place, body=dict(experiment), _request_timeout=_TIMEOUT)
        return [f"Experiment {name} is created; the same command shows its state"]
    except client.ApiException as error:
        if error.status != 409:
            raise _rejected(error) from None
    except HTTPError as error:
        raise ValueError(f"Kubernetes at {core.api_client.configuration.host} cannot be reached: {error}") from None
    try:
        return _state(name, api.get_namespaced_custom_object(**place, name=name, _request_timeout=_TIMEOUT).get("status") or {})
    except client.ApiException as error:
        raise _rejected(error) from None


def _rejected(error: client.ApiException) -> ValueError:
    return ValueError(f"Kubernetes rejected the Experiment ({error.status}): {reason_of_api(error)}")


def _state(name: str, status: Mapping[str, Any]) -> list[str]:
    """Return number of trials, and the settings and gain of the best one."""
    reached = [each["type"] for each in status.get("conditions") or [] if each.get("status") == "True"]
    counts = [f"{status[key]} {word}" for key, word in _COUNTS.items() if status.get(key)]
    lines = [f"Experiment {name}: {', '.join([reached[-1] if reached else 'Created', *counts])}"]
    best = status.get("currentOptimalTrial") or {}
    if best.get("bestTrialName"):
        gains = [each["latest"] for each in best["observation"]["metrics"] if each["name"] == OBJECTIVE]
        settings = " ".join(f"{each['name']}={each['value']}" for each in best.get("parameterAssignments") or [])
        lines.append(f"best: {best['bestTrialName']}, gain {gains[0]}: {settings}")
    return lines


_COUNTS = {
    "trialsSucceeded": "trials succeeded",
    "trialsRunning": "running",
    "trialsPending": "pending",
    "trialsFailed": "failed",
    "trialsKilled": "killed",
    "trialMetricsUnavailable": "without a gain",
}
"""Counts in the status of an Experiment."""
