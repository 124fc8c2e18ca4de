"""Training on several nodes: the TrainJob of Kubeflow Trainer, and the small step that starts it and waits for its end."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kubernetes import client, config
from urllib3.exceptions import HTTPError

from pixelclip.config import TrainConfig
from pixelclip.stage import METRICS, Metrics
from pixelclip.storage import read_json
from pixelclip.tracking import PARENT_RUN, PIPELINE_RUN
from pixelclip_pipelines.cluster import Cluster, Source, seconds, told

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
MANAGER = "pixelclip.io/pipeline"
"""Who owns the patches of the runtime, as Kubeflow Trainer wants to know."""
_POLL = "pixelclip.io/poll-seconds"
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_PASSED_ON = (PIPELINE_RUN, PARENT_RUN, "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI")
_GROUP = 1000  # of the image: Kubernetes lets it write to a fresh volume, where the volume's driver can
_ANSWER = 5.0  # seconds to wait for an answer; urllib3 asks four times, and KFP kills a step 30 s after it has told it to stop
_PATIENCE = 40  # looks in a row that may fail before the API server counts as gone


def template(cluster: Cluster, nodes: int, image: str) -> dict[str, Any]:
    """The TrainJob of a training, without its name and what a run adds to it.

    Args:
        cluster: what a node gets is what step `train` gets.
        nodes: how many.
        image: container image.

    Raises:
        ValueError: the cluster has no volume that all nodes could share, or the launcher would not live as long.
    """
    if not cluster.volume.claim:
        raise ValueError("several nodes need a volume that they share: volume.claim in cluster.yaml")
    step, volume = cluster.steps["train"], cluster.volume
    if seconds(cluster.steps["train_job"].timeout) < seconds(step.timeout):
        raise ValueError(
            f"steps.train_job.timeout is shorter than the training that it waits for: steps.train.timeout {step.timeout}"
        )
    volumes = [{"name": "workspace", "persistentVolumeClaim": {"claimName": volume.claim}}]
    mounts = [{"name": "workspace", "mountPath": volume.mount}]
    if step.shared_memory:
        volumes.append({"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": step.shared_memory}})
        mounts.append({"name": "dshm", "mountPath": "/dev/shm"})
    pod = {
        "securityContext": {"fsGroup": _GROUP},
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
        "nodeSelector": step.node_selector,
        "tolerations": [{key: value for key, value in each.model_dump().items() if value} for each in step.stands_on],
        "imagePullSecrets": [{"name": name} for name in cluster.pull_secrets],
    }
    node = {"name": "node", "template": {"spec": {"template": {"spec": {key: value for key, value in pod.items() if value}}}}}
    gpus = {step.gpu_type: str(step.gpus)} if step.gpus else {}
    environment = [
        *({"name": name, "value": value} for name, value in told(step, image).items()),
        *_environment(cluster.secrets, "secretKeyRef"),
        *_environment(cluster.config_maps, "configMapKeyRef"),
    ]
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
            "trainer": {
                "image": image,
                "numNodes": nodes,
                "numProcPerNode": max(1, step.gpus),
                # Kubeflow Trainer tells torchrun by PET_* variables who and how many they are.
                "command": ["python3", "-m", "torch.distributed.run", "-m", "pixelclip", "train"],
                "args": [],
                "env": environment,
                "resourcesPerNode": {
                    "requests": {"cpu": step.cpu, "memory": step.memory, **gpus},
                    "limits": {"cpu": step.cpu_limit, "memory": step.memory_limit, **gpus},
                },
            },
            "runtimePatches": [
                {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}}},
            ],
        },
    }


def _environment(sources: list[Source], kind: str) -> list[dict[str, Any]]:
    return [
        {"name": variable, "valueFrom": {kind: {"name": source.name, "key": key, "optional": source.optional}}}
        for source in sources
        for variable, key in source.env.items()
    ]


def complete(job: dict[str, Any], masks: Path, out: Path, settings: TrainConfig) -> dict[str, Any]:
    """The TrainJob of one run: its name, what it trains on, and whose MLflow run it writes to.

    Raises:
        ValueError: a path that the nodes would not see.
    """
    (node,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    mounts = [mount["mountPath"] for mount in node["template"]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]]
    for path in (masks, out):
        if not path.is_relative_to(mounts[0]):
            raise ValueError(f"{path}: is not below {mounts[0]}, so the nodes cannot see it; set the parameter `workspace`")
    given = {f"train.{name}": value for name, value in settings.model_dump().items()}
    passed = [{"name": name, "value": os.environ[name]} for name in _PASSED_ON if os.environ.get(name)]
    trainer = job["spec"]["trainer"]
    known = {each["name"] for each in trainer["env"]}
    trainer = trainer | {
        "args": ["--masks", str(masks), "--out", str(out), *(f"{name}={json.dumps(value)}" for name, value in given.items())],
        "env": [*trainer["env"], *(each for each in passed if each["name"] not in known)],
    }
    metadata = job["metadata"] | {"name": f"pixelclip-{os.environ.get(PIPELINE_RUN, 'by-hand')}"}
    return job | {"metadata": metadata, "spec": job["spec"] | {"trainer": trainer}}


def train_on_nodes(job: str, workspace: str, settings: TrainConfig) -> Metrics:
    """Starts a TrainJob and waits for its end. Tried again, it waits for the one that runs, or replaces the failed one.

    Args:
        job: `template` as JSON.
        workspace: folder on the volume that the nodes share, where stage masks has left its result.
        settings: of the training.

    Returns:
        The training's metrics.

    Raises:
        ValueError: no workspace, or one that the nodes do not see.
        RuntimeError: the TrainJob failed or vanished, or Kubernetes refuses or cannot be reached.
    """
    if not workspace:
        raise ValueError("a training on several nodes needs the parameter `workspace`: a folder on the volume that they share")
    out = Path(workspace, "train")
    body = complete(json.loads(job), Path(workspace, "masks"), out, settings)
    with _told_to_stop() as signals:
        jobs = _Jobs(body["metadata"]["name"], signals)
        try:
            jobs.start(body)
            state = jobs.wait(float(body["metadata"]["annotations"][_POLL]))
        except SystemExit:
            jobs.delete()  # the run was stopped; the nodes must not train on
            raise
    if state["type"] == "Failed":
        raise RuntimeError(f"TrainJob {jobs.name} failed: {state.get('reason', '')} {state.get('message', '')}".strip())
    return dict(read_json(out / METRICS))


@contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """The signals that came, of the kind by which KFP stops a step.

    They are looked at between requests: an exception out of the handler would leave a request's connection as it is, and be
    lost where Python happens to be in a destructor.
    """
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


class _Jobs:
    """The TrainJob of one name; start and wait raise SystemExit when one of `signals` came."""

    def __init__(self, name: str, signals: list[int]) -> None:
        try:
            config.load_incluster_config()
        except config.ConfigException:
            config.load_kube_config()
        self.name = name
        self._signals = signals
        here = _NAMESPACE.read_text().strip() if _NAMESPACE.is_file() else "default"
        self._where = {"group": GROUP, "version": VERSION, "namespace": here, "plural": PLURAL}
        self._api = client.CustomObjectsApi()

    def start(self, body: dict[str, Any]) -> None:
        """Creates it, where it is not there already and has not failed."""
        try:
            there = self._get()
            if there is not None and (_ending(there) or {}).get("type") == "Failed":
                print(
                    f"TrainJob {self.name} had failed; it is replaced, and training continues from its last checkpoint",
                    flush=True,
                )
                self.delete()
                while self._get() is not None:
                    self._rest(1.0)
                there = None
            if there is not None:
                print(f"TrainJob {self.name} is there already", flush=True)
                return
            self._api.create_namespaced_custom_object(**self._where, body=body)
        except (client.ApiException, HTTPError) as error:
            status = f"{error.status} " if isinstance(error, client.ApiException) else ""
            raise RuntimeError(f"TrainJob {self.name} cannot be created: {status}{_said(error)}") from None
        namespace = self._where["namespace"]
        print(
            f"TrainJob {self.name} started; its logs: kubectl logs -n {namespace} -f "
            f"-l jobset.sigs.k8s.io/jobset-name={self.name}",
            flush=True,
        )

    def wait(self, pause: float) -> dict[str, Any]:
        """Waits until it ended, however; returns the condition that says so."""
        failures = 0
        while True:
            try:
                there = self._get()
                failures = 0
            except (client.ApiException, HTTPError) as error:
                failures += 1
                if failures > _PATIENCE or (isinstance(error, client.ApiException) and error.status in (401, 403)):
                    raise RuntimeError(f"TrainJob {self.name} cannot be watched: {_said(error)}") from None
                print(f"TrainJob {self.name}: Kubernetes does not answer ({_said(error)}); waiting goes on", flush=True)
                self._rest(pause)
                continue
            if there is None:
                raise RuntimeError(f"TrainJob {self.name} was deleted before its end")
            if ending := _ending(there):
                return ending
            self._rest(pause)

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._signals and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))  # a signal does not end a sleep
        if self._signals:
            raise SystemExit(128 + self._signals[0])

    def delete(self) -> None:
        """Deletes it and its pods, if it is there."""
        try:
            self._api.delete_namespaced_custom_object(**self._where, name=self.name, propagation_policy="Foreground")
        except client.ApiException as error:
            if error.status != 404:
                raise

    def _get(self) -> dict[str, Any] | None:
        try:
            return self._api.get_namespaced_custom_object(**self._where, name=self.name, _request_timeout=_ANSWER)
        except client.ApiException as error:
            if error.status == 404:
                return None
            raise


def _ending(job: dict[str, Any]) -> dict[str, Any] | None:
    conditions = job.get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] in ("Complete", "Failed") and each["status"] == "True"), None)


def _said(error: Exception) -> str:
    if isinstance(error, client.ApiException) and error.body:
        try:
            return str(json.loads(error.body)["message"])
        except (ValueError, KeyError, TypeError):
            pass
    return str(getattr(error, "reason", error)).splitlines()[0]
