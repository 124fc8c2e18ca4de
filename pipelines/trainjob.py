"""Training on several nodes: the TrainJob of Kubeflow Trainer. `launcher` starts it, waits for it and deletes it."""

import os
from pathlib import Path
from typing import Any

from pixelclip.config import TrainConfig
from pixelclip.tracking.run import PARENT_RUN, PIPELINE_RUN
from pixelclip.workflow.failures import FAILURE_FILE
from pixelclip_pipelines.cluster_config import Cluster, Step, node_rules, pod_environment
from pixelclip_pipelines.cluster_sections import seconds
from pixelclip_pipelines.parameters import as_arguments

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODE = "node"
"""Name of the nodes' job and container in the runtimes of Kubeflow Trainer."""
MANAGER = "pixelclip.io/pipeline"
"""Owner of the runtime patches; Kubeflow Trainer requires this field."""
POLL = "pixelclip.io/poll-seconds"
"""Annotation with the seconds between two checks of the TrainJob."""
_FORWARDED = (PIPELINE_RUN, PARENT_RUN, "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI")


def template(cluster: Cluster, nodes: int, image: str) -> dict[str, Any]:
    """Return the TrainJob without the fields that depend on the run: name, arguments and MLflow run.

    Args:
        cluster: settings of the cluster; each node has the resources of step `train`.
        nodes: number of nodes.
        image: container image.

    Raises:
        ValueError: the cluster has no shared volume, or the launcher would time out before `train`.
    """
    step = cluster.steps["train"]
    if not cluster.volume.claim:
        raise ValueError("a TrainJob needs a volume that other pods share: volume.claim in cluster.yaml, not size")
    if seconds(cluster.steps["train_job"].timeout) < seconds(step.timeout):
        launcher = cluster.steps["train_job"].timeout
        raise ValueError(f"steps.train_job.timeout {launcher}: must be at least steps.train.timeout ({step.timeout})")
    pod = {"metadata": _metadata(cluster), "spec": _pod(cluster, step)}
    node = {"name": NODE, "template": {"spec": {"template": {key: value for key, value in pod.items() if value}}}}
    gpus = {step.gpu_type: str(step.gpus)} if step.gpus else {}
    environment = [
        *({"name": name, "value": value} for name, value in pod_environment(cluster, step, image).items()),
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
    labels = {"app.kubernetes.io/name": "pixelclip", "app.kubernetes.io/component": "train"}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "labels": labels | cluster.pods.queue_labels,
            "annotations": {POLL: str(seconds(cluster.trainer.poll))},
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


def _metadata(cluster: Cluster) -> dict[str, Any]:
    """Return labels and annotations of the nodes' pods. Kueue's labels belong to the TrainJob, not to its pods."""
    found = {"labels": cluster.pods.labels, "annotations": cluster.pods.annotations}
    return {key: value for key, value in found.items() if value}


def _pod(cluster: Cluster, step: Step) -> dict[str, Any]:
    """Return the parts of the nodes' pods that a TrainJob may set."""
    volume, pods = cluster.volume, cluster.pods
    volumes: list[dict[str, Any]] = [{"name": "workspace", "persistentVolumeClaim": {"claimName": volume.claim}}]
    mounts = [{"name": "workspace", "mountPath": volume.mount}]
    if step.shared_memory:
        volumes.append({"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": step.shared_memory}})
        mounts.append({"name": "dshm", "mountPath": "/dev/shm"})
    if cluster.certificates.source:
        volumes.append(cluster.certificates.volume)
        mounts.append({"name": cluster.certificates.source, "mountPath": cluster.certificates.mount})
    for name, path, limit in pods.scratch:
        volumes.append({"name": name, "emptyDir": {"sizeLimit": limit} if limit else {}})
        mounts.append({"name": name, "mountPath": path})
    container: dict[str, Any] = {"name": NODE, "volumeMounts": mounts}
    if pods.restricted:
        container["securityContext"] = pods.container_security
    required, preferred = node_rules(cluster, step)
    rules: dict[str, Any] = {}
    if required:
        term = {"nodeSelectorTerms": [{"matchExpressions": required}]}
        rules["requiredDuringSchedulingIgnoredDuringExecution"] = term
    if preferred:
        terms = [{"weight": weight, "preference": {"matchExpressions": [rule]}} for weight, rule in preferred]
        rules["preferredDuringSchedulingIgnoredDuringExecution"] = terms
    pod = {
        # As fsGroup, the group of the image's user can write to a fresh volume if the volume's driver supports it.
        "securityContext": {"fsGroup": pods.group},
        "volumes": volumes,
        "containers": [container],
        "nodeSelector": step.node_selector,
        "affinity": {"nodeAffinity": rules} if rules else {},
        "tolerations": step.pod_tolerations,
        "imagePullSecrets": [{"name": name} for name in cluster.pull_secrets],
    }
    return {key: value for key, value in pod.items() if value}


def complete(job: dict[str, Any], masks: Path, out: Path, settings: TrainConfig) -> dict[str, Any]:
    """Return the TrainJob of one run, with its name, owner, arguments and MLflow run.

    Raises:
        ValueError: a path is not on the shared volume.
    """
    (node,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    mount = node["template"]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]["mountPath"]
    for path in (masks, out):
        if not path.is_relative_to(mount):
            raise ValueError(f"{path}: must be below {mount}, the volume that the nodes share; set the parameter `workspace`")
    overrides = as_arguments({f"train.{name}": value for name, value in settings.model_dump().items()})
    trainer = job["spec"]["trainer"]
    defined = {variable["name"] for variable in trainer["env"]}
    forwarded = [name for name in _FORWARDED if os.environ.get(name) and name not in defined]
    trainer = trainer | {
        "args": ["--masks", str(masks), "--out", str(out), *overrides],
        "env": [
            *trainer["env"],
            *({"name": name, "value": os.environ[name]} for name in forwarded),
            {"name": FAILURE_FILE, "value": str(failure_file(out))},
        ],
    }
    owners = [owner] if (owner := launcher_pod()) else []
    metadata = job["metadata"] | {"name": job_name()} | ({"ownerReferences": owners} if owners else {})
    return job | {"metadata": metadata, "spec": job["spec"] | {"trainer": trainer}}


def failure_file(out: Path) -> Path:
    """Return the file, on the shared volume, in which the nodes report why a training into `out` failed."""
    return out.with_name(f".{out.name}.failure")


def job_name() -> str:
    """Return the name of this pipeline run's TrainJob."""
    return f"pixelclip-{os.environ.get(PIPELINE_RUN, 'by-hand')}"


def launcher_pod() -> dict[str, Any]:
    """Return this pod as owner of the TrainJob, or nothing outside of KFP. Kubernetes deletes a TrainJob with its owner."""
    name, uid = os.environ.get("KFP_POD_NAME"), os.environ.get("KFP_POD_UID")
    return {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid} if name and uid else {}
