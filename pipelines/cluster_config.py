"""Typed settings of a cluster, read from `cluster.yaml`: image, secrets, volume, and the resources of every step.

The file contains names of Secrets and ConfigMaps but never their values. This module must not import kfp, because running steps
import it and cannot import most of kfp.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from kubernetes.utils.quantity import parse_quantity
from pydantic import AfterValidator, Field, field_validator, model_validator

from pixelclip.settings import build, nearest, read_yaml
from pixelclip_pipelines.cluster_sections import (
    RUN_VOLUME,
    CertificateBundle,
    Cpu,
    Duration,
    Memory,
    Name,
    NodeRule,
    NoMemory,
    Pods,
    Proxy,
    RunLimits,
    Section,
    Source,
    Toleration,
    Trainer,
    Volume,
    seconds,
)

FILE = Path("cluster.yaml")
"""Read from the current folder if no other file is given."""
_HOST = r"[a-z0-9][a-z0-9._-]*(:\d+(?=/))?"
_DAY = 86_400
_MAX_DAYS = 365
_GPU_TYPE = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_OF_THE_PLUGIN = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")


def _checked_image(image: str) -> str:
    match = re.fullmatch(rf"{_HOST}(/[a-z0-9._-]+)*(:\w[\w.-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?", image)
    if not match or not (match[3] or match[4]):
        raise ValueError(f"{image!r} must end with a tag (NAME:TAG) or a digest (NAME@sha256:64 hexadecimal digits)")
    return image


Image = Annotated[str, AfterValidator(_checked_image)]


class Step(Section):  # type: ignore[misc]  # mypy cannot follow the name under which this package is installed
    """Resources, placement, timeout and retries of one step."""

    cpu: Cpu = Field("500m", description="CPU request: CPUs reserved on the node.")
    cpu_limit: Cpu = Field("2", description="CPU limit.")
    memory: Memory = Field("1Gi", description="Memory request: memory reserved on the node.")
    memory_limit: Memory = Field("4Gi", description="Memory limit; a step that exceeds it is killed.")
    gpus: int = Field(0, ge=0, description="GPUs of the pod; train starts one process per GPU.")
    gpu_type: str = Field(
        "nvidia.com/gpu",
        pattern=f"^{_GPU_TYPE}$",
        description="Resource name of the GPUs: nvidia.com/gpu, amd.com/gpu, or a part of one such as nvidia.com/mig-1g.10gb.",
    )
    shared_memory: NoMemory = Field("", description="Size of /dev/shm, for data loaders; 64 MiB if empty.")
    node_selector: dict[str, str] = Field({}, description="Labels that the node must have.")
    node_affinity: list[NodeRule] = Field([], description="Rules about nodes, besides those in `pods`.")
    tolerations: list[Toleration] = Field(
        [], description="Tolerations of the pod; steps with GPUs tolerate the GPU taint by default."
    )
    timeout: Duration = Field("1h", description="Time limit of one pod with all its attempts: 90s, 20m, 4h, 2d.")
    retries: int = Field(
        2, ge=0, le=100, description="Retries after a kill, a network fault or a lost pod; never after bad input."
    )
    backoff: Duration = Field("30s", description="Delay before the first retry.")
    backoff_factor: int = Field(2, ge=1, le=100, description="Growth factor of the delay, an integer.")

    @model_validator(mode="after")
    def _consistent(self) -> "Step":
        for name in ("cpu", "memory"):
            request, limit = getattr(self, name), getattr(self, f"{name}_limit")
            if parse_quantity(request) > parse_quantity(limit):
                raise ValueError(f"{name} {request} is more than {name}_limit {limit}")
        if self.gpus > 1 and "/mig-" in self.gpu_type:
            raise ValueError(f"gpus {self.gpus} of {self.gpu_type}: CUDA shows a process only one part of a GPU; set gpus to 1")
        if (days := self.total_seconds // _DAY) > _MAX_DAYS:
            raise ValueError(
                f"retries {self.retries}, timeout {self.timeout}, backoff {self.backoff} and backoff_factor "
                f"{self.backoff_factor} come to {days} days; the limit is {_MAX_DAYS}"
            )
        return self

    @property
    def pod_tolerations(self) -> list[dict[str, str]]:
        """The tolerations, by default one for the usual taint of GPU nodes if the step has GPUs; without empty fields."""
        taint = Toleration(key=f"{self.gpu_type.partition('/')[0]}/gpu", effect="NoSchedule")
        chosen = self.tolerations or ([taint] if self.gpus else [])
        return [{key: value for key, value in each.model_dump().items() if value} for each in chosen]

    @property
    def total_seconds(self) -> int:
        """Time limit of all pods and the delays between them."""
        delays = sum(seconds(self.backoff) * self.backoff_factor**number for number in range(self.retries))
        return (self.retries + 1) * seconds(self.timeout) + delays


_EVALUATION = {
    **{"cpu": "4", "cpu_limit": "8", "memory": "16Gi", "memory_limit": "48Gi"},
    **{"gpus": 1, "shared_memory": "8Gi", "timeout": "12h"},
}
STEPS: dict[str, dict[str, Any]] = {
    "pin_revision": {"timeout": "20m"},  # includes the wait of a pod that cannot start, for example without its ConfigMap
    "fetch_data": {"memory": "2Gi", "timeout": "6h"},
    "shards": {"cpu": "2", "cpu_limit": "4", "memory": "2Gi", "memory_limit": "8Gi", "timeout": "12h"},
    "masks": {"cpu": "4", "cpu_limit": "8", "memory": "8Gi", "memory_limit": "32Gi", "shared_memory": "4Gi", "timeout": "24h"},
    "train": {
        **{"cpu": "8", "cpu_limit": "16", "memory": "32Gi", "memory_limit": "96Gi"},
        **{"gpus": 1, "shared_memory": "16Gi", "timeout": "2d", "retries": 3, "backoff": "1m"},
    },
    "train_job": {"cpu": "100m", "cpu_limit": "1", "memory": "512Mi", "memory_limit": "2Gi", "timeout": "3d", "retries": 3},
    "evaluate_clip": _EVALUATION,
    "evaluate": _EVALUATION,
    "register": {"memory": "2Gi", "memory_limit": "8Gi", "retries": 3},
    "finish": {"timeout": "20m", "retries": 3},
    "sweep_table": {"timeout": "20m"},
    "fetch_model": {"memory": "2Gi", "timeout": "2h"},
    "predict": {**_EVALUATION, "timeout": "24h"},
    "merge": {"memory": "2Gi", "memory_limit": "8Gi", "timeout": "12h"},
}
"""The steps of the pipelines and their defaults where these differ from `Step`. A file overrides single settings."""


class Cluster(Section):  # type: ignore[misc]
    """All settings of a cluster."""

    image: Image = Field("pixelclip:dev", description="Container image of all steps; --image and PIXELCLIP_IMAGE override it.")
    pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = Field("", description="The default of Kubernetes if empty.")
    pull_secrets: list[Name] = Field([], description="Names of Secrets with credentials of the image registry.")
    parts: int = Field(
        1,
        ge=1,
        le=10_000,
        description="Parallel parts of masks and of pixelclip-predict; at most the number of shards or images.",
    )
    parallel: int = Field(0, ge=0, description="Parts that run at once; 0 means all.")
    endpoint: str = Field("", description="URL of KFP; --endpoint, KFP_ENDPOINT and KF_PIPELINES_ENDPOINT override it.")
    namespace: str = Field("", description="Namespace of the profile, if KFP is multi-user.")
    experiment: str = Field("pixelclip", min_length=1, description="KFP experiment of the runs.")
    mlflow_ui: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="URL of MLflow's pages in a browser, for links; if empty, MLflow's address.",
    )
    service_account: str = Field("", description="Service account of the runs; KFP's default if empty.")
    secrets: list[Source] = Field([], description="Secrets whose keys become environment variables of all steps.")
    config_maps: list[Source] = Field([], description="ConfigMaps whose keys become environment variables of all steps.")
    pods: Pods = Field(Pods(), description="What the pods of all steps have in common.")
    proxy: Proxy = Field(Proxy(), description="HTTP proxy of all steps.")
    certificates: CertificateBundle = Field(CertificateBundle(), description="Certificates that all steps trust.")
    run: RunLimits = Field(RunLimits(), description="Time limit of a run, and when it is deleted.")
    volume: Volume = Field(Volume(), description="Volume for the pipeline's parameter `workspace`.")
    trainer: Trainer = Field(Trainer(), description="Kubeflow Trainer.")
    steps: dict[str, Step] = Field({}, validate_default=True, description="Resources of each step; see `STEPS`.")

    @field_validator("steps", mode="before")
    @classmethod
    def _with_defaults(cls, steps: Any) -> Any:
        if not isinstance(steps, dict):
            return steps
        for name in steps:
            if name not in STEPS:
                raise ValueError(f"unknown step {name!r}{nearest(str(name), STEPS)}; the steps are {', '.join(STEPS)}")
        chosen = {name: steps.get(name, {}) for name in STEPS}
        return {name: {**STEPS[name], **step} if isinstance(step, dict) else step for name, step in chosen.items()}

    @model_validator(mode="after")
    def _unique_variables(self) -> "Cluster":
        names = [name for source in (*self.secrets, *self.config_maps) for name in source.env]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"secrets and config_maps: environment variables defined twice: {', '.join(duplicates)}")
        for section, own in (("proxy", self.proxy.variables), ("certificates", self.certificates.variables)):
            if both := sorted(set(names) & set(own)):
                raise ValueError(f"{section}: also defined in secrets or config_maps: {', '.join(both)}")
        if taken := [name for name in names if name in _OF_THE_PLUGIN]:
            raise ValueError(
                f"secrets and config_maps: {taken[0]} is a variable of KFP's MLflow plugin, and Kubernetes rejects a pod in "
                "which both define it; the variable for MLflow's address is PIXELCLIP_MLFLOW_URI"
            )
        return self

    @model_validator(mode="after")
    def _distinct_volumes(self) -> "Cluster":
        if self.volume.claim and self.volume.claim == self.certificates.source:
            raise ValueError(
                f"volume.claim and certificates: both are named {self.volume.claim!r}, after which KFP names the pods' volumes"
            )
        return self


def read(path: Path | None = None) -> Cluster:
    """Read the settings of a cluster.

    Args:
        path: a YAML file; by default `cluster.yaml` of the current folder, or the defaults if there is none.

    Raises:
        ValueError: the file cannot be read or is invalid; the message has one line per error.
    """
    if path is None and not FILE.is_file():
        return Cluster()
    path = path or FILE
    return build(Cluster, read_yaml(path, "keys and values"), str(path))


def image_of(cluster: Cluster, image: str = "") -> str:
    """Return the container image of all steps: `image`, else PIXELCLIP_IMAGE, else the cluster's.

    Raises:
        ValueError: the image has neither tag nor digest.
    """
    return _checked_image(image or os.environ.get("PIXELCLIP_IMAGE") or cluster.image)


def shared_folder(cluster: Cluster) -> str:
    """Return the folder in which all steps share a volume, or an empty string if they share none."""
    return RUN_VOLUME if cluster.volume.size else cluster.volume.mount if cluster.volume.claim else ""


def default_workspace(cluster: Cluster | None) -> str:
    """Return the workspace of a run that names none: the volume that KFP creates for it, or an empty string."""
    return RUN_VOLUME if cluster and cluster.volume.size else ""


def pod_environment(cluster: Cluster, step: Step, image: str) -> dict[str, str]:
    """Return the variables of a pod: its image (for the lineage), number of GPUs, MLflow's pages, proxy, certificates."""
    variables = {"PIXELCLIP_IMAGE": image}
    variables |= {"PIXELCLIP_GPUS": str(step.gpus)} if step.gpus else {}
    variables |= {"PIXELCLIP_MLFLOW_UI": cluster.mlflow_ui} if cluster.mlflow_ui else {}
    return variables | cluster.proxy.variables | cluster.certificates.variables


def pod_labels(cluster: Cluster) -> dict[str, str]:
    """Return the labels of every pod: the file's own and Kueue's."""
    return cluster.pods.labels | cluster.pods.queue_labels


def node_rules(cluster: Cluster, step: Step) -> tuple[list[dict[str, Any]], list[tuple[int, dict[str, Any]]]]:
    """Return the rules about the nodes of a step: the required ones, all of which must hold, and the preferred with weights."""
    rules = [*cluster.pods.node_affinity, *step.node_affinity]
    required = [rule.expression for rule in rules if not rule.weight]
    return required, [(rule.weight, rule.expression) for rule in rules if rule.weight]
