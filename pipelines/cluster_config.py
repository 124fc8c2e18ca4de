"""What a cluster gives each step: one small typed file, `cluster.yaml`, and how it reaches the tasks of a pipeline.

Nothing secret stands in it: secrets and config maps are named, and the cluster puts their values into the pods.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from kfp import dsl, kubernetes
from kubernetes.utils.quantity import parse_quantity
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pixelclip.config import nearest, read_yaml
from pixelclip.tracking import PIPELINE_RUN

FILE = Path("cluster.yaml")
"""Read from the present folder where no other file is given."""
RUN_LABEL = "metadata.labels['pipeline/runid']"
"""Where KFP writes the id of the run on every pod of it."""
_HOST = r"[a-z0-9][a-z0-9._-]*(:\d+(?=/))?"
_STRICT = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST = 365 * _SECONDS["d"]


def _checked_image(image: str) -> str:
    found = re.fullmatch(rf"{_HOST}(/[a-z0-9._-]+)*(:\w[\w.-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?", image)
    if not found or not (found[3] or found[4]):
        raise ValueError(f"{image!r} must end with a tag (NAME:TAG) or a digest (NAME@sha256:64 hexadecimal digits)")
    return image


Image = Annotated[str, AfterValidator(_checked_image)]
Cpu = Annotated[str, Field(pattern=r"^(\d+(\.\d+)?|\d+m)$")]
Memory = Annotated[str, Field(pattern=r"^\d+(Ki|Mi|Gi|Ti|M|G|T)?$")]
Duration = Annotated[str, Field(pattern=r"^[1-9]\d*[smhd]$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=253)]


def seconds(duration: str) -> int:
    """`90s`, `20m`, `4h` or `2d` in seconds."""
    return int(duration[:-1]) * _SECONDS[duration[-1]]


class Toleration(BaseModel):
    """A taint that a step's pod may stand on."""

    model_config = _STRICT
    key: str = Field("", description="The taint's key; empty tolerates every taint.")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="Exists, or Equal to `value`.")
    value: str = Field("", description="The taint's value, for operator Equal.")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field("", description="Empty: every effect.")

    @model_validator(mode="after")
    def _fits(self) -> "Toleration":
        if (self.operator == "Equal") != bool(self.value) or (self.operator == "Equal" and not self.key):
            raise ValueError(f"operator {self.operator} with key {self.key!r} and value {self.value!r}: Equal needs both")
        return self


class Step(BaseModel):
    """What one step's pod asks for."""

    model_config = _STRICT
    cpu: Cpu = Field("500m", description="CPUs that the node must have free.")
    cpu_limit: Cpu = Field("2", description="CPUs that the step may use.")
    memory: Memory = Field("1Gi", description="Memory that the node must have free.")
    memory_limit: Memory = Field("4Gi", description="More than this, and the step is killed.")
    gpus: int = Field(0, ge=0, description="GPUs of the pod; train uses all of them by torchrun.")
    gpu_type: str = Field("nvidia.com/gpu", description="Resource name of the GPUs.")
    shared_memory: Memory | Literal[""] = Field("", description="Size of /dev/shm (data loaders need it); empty: 64 MiB.")
    node_selector: dict[str, str] = Field({}, description="Labels that the node must have.")
    tolerations: list[Toleration] = Field([], description="Taints that the pod may stand on; none: with GPUs the GPUs' own.")
    timeout: Duration = Field("1h", description="The pod is ended after this time: 90s, 20m, 4h, 2d.")
    retries: int = Field(2, ge=0, description="How often a failed step is tried again.")
    backoff: Duration = Field("30s", description="Pause before the first retry.")
    backoff_factor: int = Field(2, ge=1, description="Every further pause is longer by this whole factor.")

    @model_validator(mode="after")
    def _fits(self) -> "Step":
        for name in ("cpu", "memory"):
            asked, limit = getattr(self, name), getattr(self, f"{name}_limit")
            if parse_quantity(asked) > parse_quantity(limit):
                raise ValueError(f"{name} {asked} is more than {name}_limit {limit}")
        if self.lasts > _LONGEST:
            raise ValueError(
                f"retries {self.retries}, timeout {self.timeout}, backoff {self.backoff} and backoff_factor "
                f"{self.backoff_factor} come to {self.lasts // _SECONDS['d']} days, allowed are {_LONGEST // _SECONDS['d']}"
            )
        return self

    @property
    def stands_on(self) -> list[Toleration]:
        """The tolerations of its pod: those given, or, with GPUs, that of the taint that their nodes usually have."""
        vendor = self.gpu_type.partition("/")[0]
        taint = Toleration(key=f"{vendor}/gpu", operator="Exists", effect="NoSchedule")
        return self.tolerations or ([taint] if self.gpus else [])

    @property
    def lasts(self) -> int:
        """The longest that all attempts and the pauses between them can take, in seconds."""
        pauses = sum(seconds(self.backoff) * self.backoff_factor**number for number in range(self.retries))
        return (self.retries + 1) * seconds(self.timeout) + pauses


_EVALUATION = {
    **{"cpu": "4", "cpu_limit": "8", "memory": "16Gi", "memory_limit": "48Gi"},
    **{"gpus": 1, "shared_memory": "8Gi", "timeout": "12h"},
}
STEPS: dict[str, dict[str, Any]] = {
    "pin_revision": {},
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
}
"""The steps of the pipelines, and where their default differs from `Step`'s; a file may change one setting of one step."""


class Source(BaseModel):
    """A Secret or a ConfigMap of the run's namespace, by name."""

    model_config = _STRICT
    name: Name = Field(description="Its name.")
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = Field(
        description="Environment variable of the steps: key in the Secret or ConfigMap.", min_length=1
    )
    optional: bool = Field(False, description="Steps start without it, too.")


class Volume(BaseModel):
    """A volume that every step sees: where finished stages are reused and killed ones resumed."""

    model_config = _STRICT
    claim: Name | Literal[""] = Field("", description="PersistentVolumeClaim (ReadWriteMany); empty: none.")
    mount: str = Field("/workspace", pattern=r"^/.+", description="Where it is mounted.")


class Trainer(BaseModel):
    """Kubeflow Trainer 2.2 or newer, for trainings on several nodes (`--nodes`)."""

    model_config = _STRICT
    runtime: Name = Field("torch-distributed", description="The ClusterTrainingRuntime.")
    poll: Duration = Field("15s", description="Pause between two looks at the TrainJob.")


class Cluster(BaseModel):
    """All that a cluster must be told."""

    model_config = _STRICT
    image: Image = Field("pixelclip:dev", description="Container image of all steps: --image and PIXELCLIP_IMAGE go before it.")
    pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = Field("", description="Empty: as Kubernetes decides.")
    pull_secrets: list[Name] = Field([], description="Secrets with the keys of the image registry, by name.")
    parts: int = Field(1, ge=1, description="Parts in which masks are made side by side; at most as many as shards.")
    parallel: int = Field(0, ge=0, description="How many of them at once; 0: all.")
    endpoint: str = Field("", description="URL of KFP: --endpoint, KFP_ENDPOINT and KF_PIPELINES_ENDPOINT go before it.")
    namespace: str = Field("", description="The profile's namespace, where KFP is multi-user.")
    experiment: str = Field("pixelclip", min_length=1, description="KFP experiment of the runs.")
    service_account: str = Field("", description="Service account of the runs; empty: KFP's own.")
    secrets: list[Source] = Field([], description="Secrets whose keys become environment variables of all steps.")
    config_maps: list[Source] = Field([], description="ConfigMaps whose keys become environment variables of all steps.")
    volume: Volume = Field(Volume(), description="A volume for the pipeline's parameter `workspace`.")
    trainer: Trainer = Field(Trainer(), description="Kubeflow Trainer.")
    steps: dict[str, Step] = Field({}, validate_default=True, description="What each step asks for; see `STEPS`.")

    @field_validator("steps", mode="before")
    @classmethod
    def _with_defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        chosen: dict[str, Any] = {name: {**default} for name, default in STEPS.items()}
        for name, found in given.items():
            if name not in STEPS:
                raise ValueError(f"unknown step {name!r}{nearest(str(name), STEPS)}; the steps are {', '.join(STEPS)}")
            chosen[name] = {**chosen[name], **found} if isinstance(found, dict) else found
        return chosen

    @model_validator(mode="after")
    def _once(self) -> "Cluster":
        names = [name for source in (*self.secrets, *self.config_maps) for name in source.env]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"environment variables come from two places: {', '.join(twice)}")
        return self


def read(path: Path | None = None) -> Cluster:
    """The cluster's settings.

    Args:
        path: a YAML file; None reads `cluster.yaml` of the present folder, or takes the defaults where there is none.

    Raises:
        ValueError: the file cannot be read, or one line a fault: which key, what was found, what is allowed.
    """
    if path is None and not FILE.is_file():
        return Cluster()
    path = path or FILE
    document = read_yaml(path) or {}
    if not isinstance(document, dict):
        raise ValueError(f"{path}: must hold keys and values, found {type(document).__name__}")
    try:
        return Cluster.model_validate(document)
    except ValidationError as error:
        raise ValueError("\n".join(_fault(path, fault) for fault in error.errors())) from None


def _fault(path: Path, fault: Mapping[str, Any]) -> str:
    *parents, key = [str(part) for part in fault["loc"]] or [""]
    where = ".".join([*parents, key])
    if fault["type"] != "extra_forbidden":
        said = fault["msg"].removeprefix("Value error, ")
        return f"{path}: {where}: {said} (found {fault['input']!r})" if where else f"{path}: {said}"
    known = list(_section(parents).model_fields)
    return f"{path}: unknown key {where!r}{nearest(key, known) or '; the keys there are ' + ', '.join(known)}"


def _section(parents: list[str]) -> type[BaseModel]:
    """The class that the keys below `parents` belong to."""
    kinds = {"volume": Volume, "trainer": Trainer, "secrets": Source, "config_maps": Source}
    if not parents:
        return Cluster
    if parents[0] == "steps":
        return Toleration if "tolerations" in parents else Step
    return kinds[parents[0]]


def image_of(cluster: Cluster, given: str = "") -> str:
    """The container image of all steps: the one given, PIXELCLIP_IMAGE, or the cluster's.

    Raises:
        ValueError: it has neither tag nor digest.
    """
    return _checked_image(given or os.environ.get("PIXELCLIP_IMAGE") or cluster.image)


def check_workspace(cluster: Cluster, workspace: str) -> None:
    """Looks whether all steps would see the workspace.

    Raises:
        ValueError: it is on no volume, so every pod would have a folder of its own.
    """
    volume = cluster.volume
    if workspace and not (volume.claim and Path(workspace).is_relative_to(volume.mount)):
        mounted = f"{volume.claim!r} at {volume.mount}" if volume.claim else "none"
        raise ValueError(
            f"--workspace {workspace}: must be a folder on the volume that steps share (volume in cluster.yaml: {mounted})"
        )


def told(step: Step, image: str) -> dict[str, str]:
    """What a pod cannot see for itself: its image, for the lineage, and how many GPUs it must find."""
    return {"PIXELCLIP_IMAGE": image} | ({"PIXELCLIP_GPUS": str(step.gpus)} if step.gpus else {})


def place_on(task: dsl.PipelineTask, cluster: Cluster, name: str, image: str) -> dsl.PipelineTask:
    """Gives a task what the cluster has for it.

    Args:
        task: a task of a pipeline that is being compiled.
        cluster: the settings.
        name: of the step in `cluster.steps`.
        image: its container image.

    Returns:
        The task.
    """
    step = cluster.steps[name]
    task.set_container_image(image)
    for variable, value in told(step, image).items():
        task.set_env_variable(variable, value)
    task.set_cpu_request(step.cpu).set_cpu_limit(step.cpu_limit)
    task.set_memory_request(step.memory).set_memory_limit(step.memory_limit)
    if step.gpus:
        task.set_accelerator_type(step.gpu_type).set_accelerator_limit(step.gpus)
    if step.shared_memory:
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", medium="Memory", size_limit=step.shared_memory)
    for key, value in step.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in step.stands_on:
        kubernetes.add_toleration(task, **{key: value for key, value in toleration.model_dump().items() if value})
    kubernetes.set_timeout(task, seconds(step.timeout))
    # KFP's longest backoff is no cap on a pause: counted from the first attempt's start, it ends all attempts.
    task.set_retry(step.retries, f"{seconds(step.backoff)}s", step.backoff_factor, f"{step.lasts}s")
    # A step's inputs are folders that KFP knows by their address, not by their content, and training and registering
    # are done for their effect in MLflow: a cached step would be a wrong one. The workspace reuses what is finished.
    task.set_caching_options(False)
    for secret in cluster.secrets:
        kubernetes.use_secret_as_env(task, secret.name, {key: env for env, key in secret.env.items()}, secret.optional)
    for config in cluster.config_maps:
        kubernetes.use_config_map_as_env(task, config.name, {key: env for env, key in config.env.items()}, config.optional)
    if cluster.volume.claim:
        kubernetes.mount_pvc(task, cluster.volume.claim, cluster.volume.mount)
    if cluster.pull_policy:
        kubernetes.set_image_pull_policy(task, cluster.pull_policy)
    if cluster.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.pull_secrets))
    return task


def tell_run(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Tells a task the id of the KFP run that it is part of, by which the steps find their one MLflow run."""
    return kubernetes.use_field_path_as_env(task, PIPELINE_RUN, RUN_LABEL)
