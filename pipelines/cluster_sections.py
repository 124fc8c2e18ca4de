"""Sections of `cluster.yaml` other than the steps: types of values, placement, pods, network, volume, end of a run.

This module must not import kfp, because running steps import it and cannot import most of kfp.
"""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pixelclip.settings import nearest
from pixelclip.storage.urls import has_secret, public_url

RUN_VOLUME = "/kfp-workspace"
"""Where KFP mounts the volume of a run, in every step with a parameter that contains this path."""
_SCRATCH = {"pixelclip-tmp": "/tmp", "pixelclip-work": "/work"}  # the home and the working folder of the image
_VOLUMES = ("dshm", "kfp-workspace", *_SCRATCH)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_SECONDS = 2**31 - 1  # kfp stores them as int32
_LABEL_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_OF_KFP = ("pipeline/", "pipelines.kubeflow.org/", "workflows.argoproj.io/")


def _checked_label(name: str) -> str:
    if name and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise ValueError(
            f"{name!r} must be a DNS label, since KFP names the pods' volume after it: at most 63 lower-case letters, digits "
            f"and '-', no '-' at its ends (found {len(name)} characters)"
        )
    if name in _VOLUMES:
        raise ValueError(f"{name!r} is the name of another volume of the pods ({', '.join(_VOLUMES)})")
    return name


def _checked_key(key: str) -> str:
    prefix, slash, name = key.rpartition("/")
    domain = not slash or re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", prefix)
    if not domain or not re.fullmatch(_LABEL_NAME, name):
        raise ValueError(f"{key!r} must be a Kubernetes key: an optional domain and '/', then at most 63 letters, digits, -_.")
    if key.startswith(_OF_KFP):
        raise ValueError(f"{key!r} belongs to KFP, which reads and sets it")
    return key


def _checked_value(value: str) -> str:
    if value and not re.fullmatch(_LABEL_NAME, value):
        raise ValueError(f"{value!r} must have at most 63 letters, digits, -_. and begin and end with a letter or digit")
    return value


def _plain(value: str) -> str:
    if "{{" in value:
        raise ValueError(f"{value!r} must not contain '{{{{', which Argo would replace")
    return value


def _quantity(value: Any) -> Any:
    return str(value) if type(value) in (int, float) else value  # as Kubernetes accepts it: cpu: 4


def _bounded(duration: str) -> str:
    if duration and seconds(duration) > _MAX_SECONDS:
        raise ValueError(f"{duration} is longer than {_MAX_SECONDS // _UNITS['d']}d")
    return duration


Cpu = Annotated[str, BeforeValidator(_quantity), Field(pattern=r"^(\d+(\.\d+)?|\d+m)$")]
Memory = Annotated[str, BeforeValidator(_quantity), Field(pattern=r"^\d+(Ki|Mi|Gi|Ti|M|G|T)?$")]
Duration = Annotated[str, BeforeValidator(_quantity), Field(pattern=r"^[1-9]\d*[smhd]$")]
NoMemory = Annotated[str, BeforeValidator(_quantity), Field(pattern=r"^(\d+(Ki|Mi|Gi|Ti|M|G|T)?)?$")]
"""Memory, or an empty string."""
Period = Annotated[str, BeforeValidator(_quantity), Field(pattern=r"^([1-9]\d{0,9}[smhd])?$"), AfterValidator(_bounded)]
"""A duration that kfp can store, or an empty string."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=253)]
NoName = Annotated[str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$", max_length=253)]
"""A name, or an empty string."""
Label = Annotated[str, AfterValidator(_checked_label)]
Key = Annotated[str, AfterValidator(_checked_key)]
LabelValue = Annotated[str, AfterValidator(_checked_value)]
Text = Annotated[str, AfterValidator(_plain)]


def seconds(duration: str) -> int:
    """Return a duration such as `90s`, `20m`, `4h` or `2d` in seconds."""
    return int(duration[:-1]) * _UNITS[duration[-1]]


class Section(BaseModel):
    """A part of the file, in which an unknown key is an error that names the nearest one."""

    model_config = ConfigDict(frozen=True)
    not_in_kfp: ClassVar[dict[str, str]] = {}
    """Keys that people look for here and that KFP cannot set, and the field of Kubernetes behind each."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key in cls.model_fields:
                continue
            if field := cls.not_in_kfp.get(str(key)):
                raise ValueError(
                    f"key {key!r}: kfp-kubernetes cannot set {field} of a step's pod; an administrator can, see "
                    "docs/cluster.md, section 4"
                )
            known = "; the keys are " + ", ".join(cls.model_fields)
            raise ValueError(f"unknown key {key!r}{nearest(str(key), cls.model_fields) or known}")
        return values


class Toleration(Section):
    """A Kubernetes toleration."""

    key: str = Field("", description="Key of the taint; every taint if empty.")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="Exists, or Equal to `value`.")
    value: str = Field("", description="Value of the taint, for operator Equal.")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field(
        "", description="Effect of the taint; every effect if empty."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Toleration":
        if (self.operator == "Equal") != bool(self.value) or (self.operator == "Equal" and not self.key):
            raise ValueError(
                f"operator {self.operator} with key {self.key!r} and value {self.value!r}: Equal needs both, Exists no value"
            )
        return self


class NodeRule(Section):
    """A condition on the labels of a node: required, or preferred if it has a weight."""

    key: Key = Field(description="Label of the node.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(description="As in Kubernetes.")
    values: list[LabelValue] = Field([], description="Values for In and NotIn; one integer for Gt and Lt.")
    weight: int = Field(0, ge=0, le=100, description="0 if the rule is required, 1 to 100 if it is preferred.")

    @model_validator(mode="after")
    def _consistent(self) -> "NodeRule":
        allowed = {"In": len(self.values) > 0, "NotIn": len(self.values) > 0}
        allowed |= dict.fromkeys(("Exists", "DoesNotExist"), not self.values)
        allowed |= dict.fromkeys(("Gt", "Lt"), len(self.values) == 1 and self.values[0].isdecimal())
        if not allowed[self.operator]:
            raise ValueError(
                f"operator {self.operator} with values {self.values}: In and NotIn need values, Exists and DoesNotExist none, "
                "Gt and Lt one integer"
            )
        return self

    @property
    def expression(self) -> dict[str, Any]:
        """The rule as Kubernetes' matchExpression."""
        return {"key": self.key, "operator": self.operator} | ({"values": self.values} if self.values else {})


_LIKE_SPREAD = "topologySpreadConstraints"
_LIKE_PRIORITY = "priorityClassName (Kueue's is the key `priority`)"


class Pods(Section):
    """What the pods of all steps have in common, for clusters with rules of their own."""

    not_in_kfp: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("topology_spread", "topology_spread_constraints", _LIKE_SPREAD), _LIKE_SPREAD),
        **dict.fromkeys(("priority_class", "priority_class_name", "priorityClassName"), _LIKE_PRIORITY),
        **dict.fromkeys(("fs_group", "fsGroup"), "securityContext.fsGroup"),
        **dict.fromkeys(("read_only_root", "readOnlyRootFilesystem"), "securityContext.readOnlyRootFilesystem"),
        **dict.fromkeys(("pod_affinity", "podAffinity", "pod_anti_affinity", "podAntiAffinity"), "affinity between pods"),
        **dict.fromkeys(("runtime_class", "runtimeClassName"), "runtimeClassName"),
        **dict.fromkeys(("scheduler", "schedulerName"), "schedulerName"),
    }

    queue: LabelValue = Field("", description="Kueue's LocalQueue in the namespace of the runs; no queue if empty.")
    priority: LabelValue = Field("", description="Kueue's WorkloadPriorityClass; needs `queue`.")
    labels: dict[Key, LabelValue] = Field({}, description="Labels of the pods.")
    annotations: dict[Key, Text] = Field({}, description="Annotations of the pods.")
    node_affinity: list[NodeRule] = Field([], description="Rules about nodes for all steps, besides those of each step.")
    restricted: bool = Field(
        False, description="Run as `user` and `group`, never as root, with volumes for /tmp and /work: nothing else is written."
    )
    user: int = Field(1000, ge=1, le=2**31 - 1, description="User ID with `restricted`; that of the image by default.")
    group: int = Field(1000, ge=1, le=2**31 - 1, description="Group ID with `restricted`, and fsGroup of the TrainJob.")
    tmp: NoMemory = Field("", description="Size limit of /tmp with `restricted`; none if empty.")

    @model_validator(mode="after")
    def _consistent(self) -> "Pods":
        if self.priority and not self.queue:
            raise ValueError(f"priority {self.priority!r} without queue: only pods in a queue of Kueue have one")
        if taken := [key for key in self.labels if key in self.queue_labels]:
            raise ValueError(f"labels: {taken[0]} is already set by queue or priority")
        return self

    @property
    def queue_labels(self) -> dict[str, str]:
        """Kueue's labels of a workload."""
        labels = {"kueue.x-k8s.io/queue-name": self.queue, "kueue.x-k8s.io/priority-class": self.priority}
        return {key: value for key, value in labels.items() if value}

    @property
    def scratch(self) -> list[tuple[str, str, str]]:
        """Name, mount path and size limit (or an empty string) of the volumes for what steps write, with `restricted`."""
        return [(name, path, self.tmp if path == "/tmp" else "") for name, path in _SCRATCH.items() if self.restricted]

    @property
    def container_security(self) -> dict[str, Any]:
        """The security context of a container under the restricted Pod Security Standard."""
        return {
            "runAsNonRoot": True,
            "runAsUser": self.user,
            "runAsGroup": self.group,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        }


class Proxy(Section):
    """An HTTP proxy, as variables of all steps; KFP's launcher reads them, too, since it runs in the same container."""

    http: str = Field("", description="Proxy for http:// addresses; none if empty.")
    https: str = Field("", description="Proxy for https:// addresses; none if empty.")
    no_proxy: list[Annotated[str, Field(pattern=r"^[^\s,]+$")]] = Field(
        [
            *("localhost", "127.0.0.1", ".svc", ".cluster.local", "$(KUBERNETES_SERVICE_HOST)"),
            *("ml-pipeline", "ml-pipeline.kubeflow", "metadata-grpc-service", "metadata-grpc-service.kubeflow"),
            *("seaweedfs.kubeflow", "minio-service.kubeflow", "mlflow.mlflow"),
        ],
        description="Names, domains and addresses that are reached directly.",
    )

    @model_validator(mode="after")
    def _public(self) -> "Proxy":
        for name in ("http", "https"):
            if has_secret(url := getattr(self, name)):
                raise ValueError(
                    f"{name} {public_url(url)} contains credentials, which KFP would store and display; set the "
                    "variables of the proxy from a Secret (`secrets`) instead"
                )
            if not re.fullmatch(r"(https?://[^\s/]+/?)?", url):
                raise ValueError(f"{name} {url!r} must be a URL: http://HOST:PORT")
        return self

    @property
    def variables(self) -> dict[str, str]:
        """Variables by name; libraries differ in whether they read the upper or the lower case."""
        chosen = {"HTTP_PROXY": self.http, "HTTPS_PROXY": self.https}
        named = {name: value for name, value in chosen.items() if value}
        named |= {"NO_PROXY": ",".join(self.no_proxy)} if named and self.no_proxy else {}
        return named | {name.lower(): value for name, value in named.items()}


class CertificateBundle(Section):
    """Certificates that all steps trust, from a ConfigMap or a Secret. They replace those of the image."""

    config_map: Label = Field("", description="ConfigMap with the certificates; none if empty.")
    secret: Label = Field("", description="Secret with the certificates, instead of a ConfigMap.")
    key: str = Field("ca-bundle.crt", pattern=r"^[\w.-]+$", description="Key with the certificates in PEM format.")
    mount: str = Field("/etc/pixelclip-certificates", pattern=r"^/.+", description="Mount path.")

    @model_validator(mode="after")
    def _one_source(self) -> "CertificateBundle":
        if self.config_map and self.secret:
            raise ValueError(f"config_map {self.config_map!r} and secret {self.secret!r}: give only one of them")
        return self

    @property
    def source(self) -> str:
        """Name of the ConfigMap or Secret, which is also the name of the pods' volume; empty without one."""
        return self.config_map or self.secret

    @property
    def volume(self) -> dict[str, Any]:
        """The volume in Kubernetes' notation."""
        of_secret = {"secret": {"secretName": self.secret}}
        return {"name": self.source, **(of_secret if self.secret else {"configMap": {"name": self.config_map}})}

    @property
    def variables(self) -> dict[str, str]:
        """The file's path in the variables of OpenSSL and Go, requests, botocore, curl and git."""
        names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO")
        return dict.fromkeys(names, f"{self.mount.rstrip('/')}/{self.key}") if self.source else {}


class RunLimits(Section):
    """When a run ends at the latest, and when the cluster forgets it."""

    deadline: Period = Field("", description="Time limit of the whole run; none if empty.")
    ttl_success: Period = Field(
        "", description="Time after success at which the run's pods and volume are deleted; KFP's default if empty."
    )
    ttl_failure: Period = Field(
        "", description="The same after a failure; KFP's *Retry* works until then. KFP's default if empty."
    )


class Source(Section):
    """A Secret or a ConfigMap in the namespace of the run."""

    name: Name = Field(description="Name of the Secret or ConfigMap.")
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = Field(
        description="Environment variables of the steps, each with its key in the Secret or ConfigMap.", min_length=1
    )
    optional: bool = Field(False, description="Whether steps also start without it.")


class Volume(Section):
    """A volume mounted by the steps, where finished stages are reused and interrupted ones resumed."""

    claim: Label = Field("", description="PersistentVolumeClaim (ReadWriteMany) that outlives runs; none if empty.")
    mount: str = Field("/workspace", pattern=r"^/.+", description="Mount path of the claim.")
    size: NoMemory = Field(
        "", description="Instead of a claim: size of a volume that KFP creates for each run and deletes after it."
    )
    storage_class: NoName = Field("", description="Storage class of a run's volume; KFP's default if empty.")
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = Field(
        "ReadWriteMany", description="Of a run's volume; ReadWriteOnce only if all steps run on one node."
    )

    @model_validator(mode="after")
    def _one_volume(self) -> "Volume":
        if self.claim and self.size:
            raise ValueError(f"claim {self.claim!r} and size {self.size!r}: give only one of them")
        if self.storage_class and not self.size:
            raise ValueError(f"storage_class {self.storage_class!r} without size: a claim has its own")
        return self


class Trainer(Section):
    """Kubeflow Trainer 2.2 or newer, for training on several nodes (`--nodes`)."""

    runtime: Name = Field("torch-distributed", description="Name of the ClusterTrainingRuntime.")
    poll: Duration = Field("15s", description="Interval between two checks of the TrainJob.")
