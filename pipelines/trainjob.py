"""Training on several nodes: the TrainJob of Kubeflow Trainer, and the launcher step that starts it and waits for it."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from kubernetes import client, config
from urllib3.exceptions import HTTPError

from pixelclip.config import TrainConfig
from pixelclip.storage.files import read_json
from pixelclip.tracking.run import PARENT_RUN, PIPELINE_RUN
from pixelclip.workflow.stage import METRICS, Metrics
from pixelclip_pipelines.cluster_config import Cluster, pod_environment, seconds

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
MANAGER = "pixelclip.io/pipeline"
"""Owner of the runtime patches; Kubeflow Trainer requires this field."""
_POLL = "pixelclip.io/poll-seconds"
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_FORWARDED = (PIPELINE_RUN, PARENT_RUN, "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI")
_GROUP = 1000  # group of the image's user; as fsGroup it can write to a fresh volume if the volume's driver supports it
_TIMEOUT = 5.0  # seconds per request; urllib3 tries four times, and KFP kills a step 30 s after SIGTERM
_MAX_FAILURES = 40  # consecutive failed requests before the launcher gives up
_REQUEST_ERRORS = (client.ApiException, HTTPError)


def template(cluster: Cluster, nodes: int, image: str) -> dict[str, Any]:
    """Return the TrainJob without the fields that depend on the run: name, arguments and MLflow run.

    Args:
        cluster: settings of the cluster; each node has the resources of step `train`.
        nodes: number of nodes.
        image: container image.

    Raises:
        ValueError: the cluster has no shared volume, or the launcher would time out before `train`.
    """
    step, volume = cluster.steps["train"], cluster.volume
    if not volume.claim:
        raise ValueError("several nodes need a volume that they share: volume.claim in cluster.yaml")
    if seconds(cluster.steps["train_job"].timeout) < seconds(step.timeout):
        launcher = cluster.steps["train_job"].timeout
        raise ValueError(f"steps.train_job.timeout {launcher}: must be at least steps.train.timeout ({step.timeout})")
    volumes: list[dict[str, Any]] = [{"name": "workspace", "persistentVolumeClaim": {"claimName": volume.claim}}]
    mounts = [{"name": "workspace", "mountPath": volume.mount}]
    if step.shared_memory:
        volumes.append({"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": step.shared_memory}})
        mounts.append({"name": "dshm", "mountPath": "/dev/shm"})
    pod = {
        "securityContext": {"fsGroup": _GROUP},
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
        "nodeSelector": step.node_selector,
        "tolerations": step.pod_tolerations,
        "imagePullSecrets": [{"name": name} for name in cluster.pull_secrets],
    }
    node = {"name": "node", "template": {"spec": {"template": {"spec": {key: value for key, value in pod.items() if value}}}}}
    gpus = {step.gpu_type: str(step.gpus)} if step.gpus else {}
    environment = [
        *({"name": name, "value": value} for name, value in pod_environment(step, image, cluster.mlflow_ui).items()),
        *(
            {"name": name, "valueFrom": {kind: {"name": source.name, "key": key, "optional": source.optional}}}
            for kind, sources in (("secretKeyRef", cluster.secrets), ("configMapKeyRef", cluster.config_maps))
            for source in sources
            for name, key in source.env.items()
        ),
    ]
    trainer = {
        "image": image,
        "numNodes": nodes,
        "numProcPerNode": max(1, step.gpus),
        # Kubeflow Trainer sets torchrun's PET_* variables: number of nodes, rank and address of the first node.
        "command": ["python3", "-m", "torch.distributed.run", "-m", "pixelclip", "train"],
        "args": [],
        "env": environment,
        "resourcesPerNode": {
            "requests": {"cpu": step.cpu, "memory": step.memory, **gpus},
            "limits": {"cpu": step.cpu_limit, "memory": step.memory_limit, **gpus},
        },
    }
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "labels": {"app.kubernetes.io/name": "pixelclip", "app.kubernetes.io/component": "train"},
            "annotations": {_POLL: str(seconds(cluster.trainer.poll))},
        },
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": cluster.trainer.runtime},
            "activeDeadlineSeconds": seconds(step.timeout),
            "trainer": trainer,
            "runtimePatches": [
                {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}}},
            ],
        },
    }


def complete(job: dict[str, Any], masks: Path, out: Path, settings: TrainConfig) -> dict[str, Any]:
    """Return the TrainJob of one run, with its name, arguments and MLflow run.

    Raises:
        ValueError: a path is not on the shared volume.
    """
    (node,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    mount = node["template"]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]["mountPath"]
    for path in (masks, out):
        if not path.is_relative_to(mount):
            raise ValueError(f"{path}: must be below {mount}, the volume that the nodes share; set the parameter `workspace`")
    overrides = [f"train.{name}={json.dumps(value)}" for name, value in settings.model_dump().items()]
    trainer = job["spec"]["trainer"]
    defined = {variable["name"] for variable in trainer["env"]}
    forwarded = [name for name in _FORWARDED if os.environ.get(name) and name not in defined]
    trainer = trainer | {
        "args": ["--masks", str(masks), "--out", str(out), *overrides],
        "env": [*trainer["env"], *({"name": name, "value": os.environ[name]} for name in forwarded)],
    }
    metadata = job["metadata"] | {"name": f"pixelclip-{os.environ.get(PIPELINE_RUN, 'by-hand')}"}
    return job | {"metadata": metadata, "spec": job["spec"] | {"trainer": trainer}}


def train_on_nodes(job: str, workspace: str, settings: TrainConfig) -> Metrics:
    """Start a TrainJob and wait until it ends. A retry waits for a running job and replaces a failed one.

    Args:
        job: output of `template` as JSON.
        workspace: folder on the shared volume with the result of stage masks.
        settings: settings of the training.

    Returns:
        The metrics of the training.

    Raises:
        ValueError: no workspace, or one that is not on the shared volume.
        RuntimeError: the TrainJob failed or was deleted, or Kubernetes is unreachable or rejects a request.
    """
    if not workspace:
        raise ValueError(
            "training on several nodes needs the parameter `workspace`: a folder on the volume that the nodes share"
        )
    out = Path(workspace, "train")
    body = complete(json.loads(job), Path(workspace, "masks"), out, settings)
    launcher = _Launcher(body)
    # The handler only records the signal, since an exception could interrupt a request.
    previous = signal.signal(signal.SIGTERM, lambda number, _frame: launcher.signals.append(number))
    try:
        launcher.start()
        condition = launcher.wait()
    except SystemExit:
        launcher.delete()  # the run was stopped, so the nodes must stop too
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    if condition["type"] == "Failed":
        reason = f"{condition.get('reason', '')} {condition.get('message', '')}".strip()
        raise RuntimeError(f"TrainJob {launcher.name} failed: {reason}")
    return dict(read_json(out / METRICS))


class _Launcher:
    """Create, watch and delete one TrainJob. `start` and `wait` raise SystemExit once `signals` is not empty."""

    def __init__(self, body: dict[str, Any]) -> None:
        try:
            config.load_incluster_config()
        except config.ConfigException:
            config.load_kube_config()
        namespace = _NAMESPACE.read_text().strip() if _NAMESPACE.is_file() else "default"
        self.name, self._body = body["metadata"]["name"], body
        self.signals: list[int] = []
        self._pause = float(body["metadata"]["annotations"][_POLL])
        self._path = {"group": GROUP, "version": VERSION, "namespace": namespace, "plural": PLURAL}
        self._api = client.CustomObjectsApi()

    def start(self) -> None:
        """Create the job. Keep an existing one unless it failed."""
        try:
            existing = self._get()
            if _final_condition(existing).get("type") == "Failed":
                self._print("failed before; replacing it, and training resumes from the last checkpoint")
                self.delete()
                while existing := self._get():
                    self._sleep(1.0)
            if existing:
                self._print("already exists")
                return
            self._api.create_namespaced_custom_object(**self._path, body=self._body)
        except _REQUEST_ERRORS as error:
            status = f"{error.status} " if isinstance(error, client.ApiException) else ""
            raise RuntimeError(f"TrainJob {self.name} cannot be created: {status}{_message(error)}") from None
        selector = f"-n {self._path['namespace']} -f -l jobset.sigs.k8s.io/jobset-name={self.name}"
        self._print(f"started; its logs: kubectl logs {selector}")

    def wait(self) -> dict[str, Any]:
        """Poll until the job has completed or failed, and return its final condition."""
        failures = 0
        while True:
            try:
                job, failures = self._get(), 0
            except _REQUEST_ERRORS as error:
                failures += 1
                if failures > _MAX_FAILURES or getattr(error, "status", None) in (401, 403):
                    raise RuntimeError(f"TrainJob {self.name} cannot be watched: {_message(error)}") from None
                self._print(f"Kubernetes does not answer ({_message(error)}); retrying")
            else:
                if job is None:
                    raise RuntimeError(f"TrainJob {self.name} was deleted before it ended")
                if condition := _final_condition(job):
                    return condition
            self._sleep(self._pause)

    def delete(self) -> None:
        """Delete the job and its pods if it exists."""
        try:
            self._api.delete_namespaced_custom_object(**self._path, name=self.name, propagation_policy="Foreground")
        except client.ApiException as error:
            if error.status != 404:
                raise

    def _get(self) -> dict[str, Any] | None:
        try:
            return self._api.get_namespaced_custom_object(**self._path, name=self.name, _request_timeout=_TIMEOUT)
        except client.ApiException as error:
            if error.status == 404:
                return None
            raise

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.signals and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))  # a signal does not end a sleep
        if self.signals:
            raise SystemExit(128 + self.signals[0])

    def _print(self, event: str) -> None:
        print(f"TrainJob {self.name}: {event}", flush=True)


def _final_condition(job: dict[str, Any] | None) -> dict[str, Any]:
    """Return the condition that ended the job, or an empty one."""
    conditions = (job or {}).get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] in ("Complete", "Failed") and each["status"] == "True"), {})


def _message(error: Exception) -> str:
    with contextlib.suppress(AttributeError, ValueError, KeyError, TypeError):
        return str(json.loads(error.body)["message"])  # type: ignore[attr-defined]
    return str(getattr(error, "reason", error)).splitlines()[0]
