"""Pods of a run, read through a kubeconfig if there is one."""

import contextlib
import json
from typing import Any

from kubernetes import client, config
from urllib3.exceptions import HTTPError

_TIMEOUT = 5.0  # seconds
_USUAL = ("PodInitializing", "ContainerCreating")  # reasons of a pod that is starting normally


def core_api() -> client.CoreV1Api | None:
    """Return a client of Kubernetes by the kubeconfig or the service account of this pod, or None without either."""
    try:
        config.load_incluster_config()
    except config.ConfigException:
        try:
            config.load_kube_config()
        except (config.ConfigException, OSError):
            return None
    return client.CoreV1Api()


def waiting_reason(namespace: str, pod: str) -> str:
    """Return what a pod waits for, as Kubernetes puts it; an empty string if that is unknown."""
    api = core_api()
    if api is None:
        return ""
    try:
        status = api.read_namespaced_pod(pod, namespace, _request_timeout=_TIMEOUT).status
    except (client.ApiException, HTTPError):
        return ""
    return reason_of(status)


def reason_of(status: Any) -> str:
    """Return why a pod with this status has not started: a container's reason, else the scheduler's."""
    for container in [*(status.init_container_statuses or []), *(status.container_statuses or [])]:
        waiting = container.state and container.state.waiting
        if waiting and waiting.reason not in _USUAL:
            return " ".join(f"{waiting.reason}: {waiting.message or ''}".split()).removesuffix(":")
    for condition in status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return " ".join(f"{condition.reason}: {condition.message or ''}".split()).removesuffix(":")
    return ""


def reason_of_api(error: Exception) -> str:
    """Return the message of Kubernetes in an API error, else the error's reason in one line."""
    with contextlib.suppress(AttributeError, ValueError, KeyError, TypeError):
        return str(json.loads(error.body)["message"])  # type: ignore[attr-defined]
    return (str(getattr(error, "reason", error)).splitlines() or [type(error).__name__])[0]
