"""Settings for other people's clusters: the pods that KFP makes of the compiled pipeline, and the nodes of the TrainJob.

`pod_of` renders a pod as KFP's driver does (backend/src/v2/driver/k8s.go): independent of our code, which calls kfp-kubernetes.
"""

import re
from pathlib import Path

import kubernetes_validate
import pytest
from kfp.components import load_component_from_file
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubernetes import client
from typer.testing import CliRunner

from helpers.compiling import compiled
from pixelclip.cli.app import app
from pixelclip.config import TrainConfig
from pixelclip_pipelines.cluster_config import read
from pixelclip_pipelines.trainjob import complete, template

EVERYTHING = """
image: registry.example/pixelclip:1.4
pull_policy: Always
pull_secrets: [registry, mirror]
parts: 2
secrets: [{name: store, env: {AWS_ACCESS_KEY_ID: key}, optional: true}]
config_maps: [{name: places, env: {PIXELCLIP_MLFLOW_URI: mlflow}}]
pods:
  queue: vision
  priority: nightly
  labels: {team: vision, example.com/cost-center: "4711"}
  annotations: {sidecar.istio.io/inject: "false", note: "any text: with spaces"}
  node_affinity:
    - {key: topology.kubernetes.io/zone, operator: In, values: [a, b]}
    - {key: node.kubernetes.io/spot, operator: DoesNotExist}
    - {key: disk, operator: In, values: [nvme], weight: 30}
  restricted: true
  user: 1234
  group: 4321
  tmp: 20Gi
proxy: {http: "http://proxy.example:3128", https: "http://proxy.example:3128", no_proxy: [.svc, 10.0.0.0/8]}
certificates: {config_map: company-ca, key: all.pem}
volume: {claim: shared}
steps:
  masks: {gpus: 1, gpu_type: nvidia.com/mig-1g.10gb}
  train:
    gpus: 2
    gpu_type: amd.com/gpu
    node_selector: {gpu: mi300}
    node_affinity: [{key: gpu-count, operator: Gt, values: ["3"]}, {key: rack, operator: In, values: [r1], weight: 70}]
"""


def affinity_of(terms: list[dict]) -> dict:
    required, preferred = [], []
    for term in terms:
        expressions = {"matchExpressions": term["matchExpressions"]}
        if "weight" in term:
            preferred.append({"weight": term["weight"], "preference": expressions})
        else:  # KFP appends a term, and Kubernetes asks for any one of them
            required.append(expressions)
    found = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": required}} if required else {}
    return found | ({"preferredDuringSchedulingIgnoredDuringExecution": preferred} if preferred else {})


def variables_of(container: dict, config: dict) -> list[dict]:
    found = list(container["env"])
    for kind, reference, key in (
        ("secretAsEnv", "secretKeyRef", "secretKey"),
        ("configMapAsEnv", "configMapKeyRef", "configMapKey"),
    ):
        for source in config.get(kind, []):
            name = source["secretName" if kind == "secretAsEnv" else "configMapName"]
            for each in source["keyToEnv"]:
                selector = {"name": name, "key": each[key], "optional": source["optional"]}
                found.append({"name": each["envVar"], "valueFrom": {reference: selector}})
    for each in config.get("fieldPathAsEnv", []):
        found.append({"name": each["name"], "valueFrom": {"fieldRef": {"fieldPath": each["fieldPath"]}}})
    return found


def volumes_of(config: dict) -> tuple[list[dict], list[dict]]:
    volumes, mounts = [], []
    for each in config.get("pvcMount", []):
        volumes.append({"name": each["constant"], "persistentVolumeClaim": {"claimName": each["constant"]}})
        mounts.append({"name": each["constant"], "mountPath": each["mountPath"]})
    for each in config.get("secretAsVolume", []):
        volumes.append({"name": each["secretName"], "secret": {"secretName": each["secretName"], "optional": each["optional"]}})
        mounts.append({"name": each["secretName"], "mountPath": each["mountPath"]})
    for each in config.get("configMapAsVolume", []):
        source = {"name": each["configMapName"], "optional": each["optional"]}
        volumes.append({"name": each["configMapName"], "configMap": source})
        mounts.append({"name": each["configMapName"], "mountPath": each["mountPath"]})
    for each in config.get("emptyDirMounts", []):
        source = {key: each[key] for key in ("medium", "sizeLimit") if key in each}
        volumes.append({"name": each["volumeName"], "emptyDir": source})
        mounts.append({"name": each["volumeName"], "mountPath": each["mountPath"]})
    return volumes, mounts


def pod_of(container: dict, config: dict) -> dict:
    resources = container["resources"]
    requests = {"cpu": resources["resourceCpuRequest"], "memory": resources["resourceMemoryRequest"]}
    limits = {"cpu": resources["resourceCpuLimit"], "memory": resources["resourceMemoryLimit"]}
    if gpus := resources.get("accelerator"):
        limits[gpus["resourceType"]] = gpus["resourceCount"]
    volumes, mounts = volumes_of(config)
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}  # which KFP sets itself
    for key, value in config.get("securityContext", {}).items():
        security[key] = int(value) if key.startswith("runAs") and key != "runAsNonRoot" else value
    main = {
        "name": "main",
        "image": container["image"],
        "command": container["command"],
        "args": container["args"],
        "env": variables_of(container, config),
        "resources": {"requests": requests, "limits": limits},
        "volumeMounts": mounts,
        "securityContext": security,
    }
    if "imagePullPolicy" in config:
        main["imagePullPolicy"] = config["imagePullPolicy"]
    spec = {
        "containers": [main],
        "volumes": volumes,
        "tolerations": config.get("tolerations", []),
        "nodeSelector": config.get("nodeSelector", {}).get("labels", {}),
        "imagePullSecrets": [{"name": each["secretName"]} for each in config.get("imagePullSecret", [])],
        "activeDeadlineSeconds": int(config["activeDeadlineSeconds"]),
        "restartPolicy": "Never",
    }
    if "nodeAffinity" in config:
        spec["affinity"] = {"nodeAffinity": affinity_of(config["nodeAffinity"])}
    metadata = {"name": "a", "namespace": "kubeflow", **config.get("podMetadata", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def pods_of(spec: dict, platform: dict) -> dict[str, dict]:
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    executors = spec["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): pod_of(each["container"], configs[name]) for name, each in executors.items()}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("everything"), EVERYTHING)


@pytest.fixture(scope="module")
def pods(everything):
    return pods_of(*everything[:2])


def main(pod: dict) -> dict:
    return pod["spec"]["containers"][0]


# Schemas.


def test_kfp_loads_the_pipeline_with_every_setting(everything):
    assert load_component_from_file(str(everything[2])).component_spec.name == "pixelclip"


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_every_pod_is_valid_kubernetes(pods, version):
    assert {"pin-revision", "train", "finish"} < set(pods)
    for pod in pods.values():
        kubernetes_validate.validate(pod, version, strict=True)
    broken = {**pods["train"], "spec": {**pods["train"]["spec"], "afinity": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_every_pod_survives_the_models_of_the_kubernetes_client(pods):
    """The models drop unknown fields, so an unchanged document has none."""
    api = client.ApiClient()
    for pod in pods.values():
        model = api._ApiClient__deserialize(pod, "V1Pod")
        assert api.sanitize_for_serialization(model) == pod
    broken = {**pod, "spec": {**pod["spec"], "afinity": {}}}
    assert api.sanitize_for_serialization(api._ApiClient__deserialize(broken, "V1Pod")) != broken


def test_volumes_of_a_pod_have_distinct_names_and_every_mount_one(pods):
    for pod in pods.values():
        names = [volume["name"] for volume in pod["spec"]["volumes"]]
        assert len(set(names)) == len(names)
        assert {mount["name"] for mount in main(pod)["volumeMounts"]} == set(names)
        paths = [mount["mountPath"] for mount in main(pod)["volumeMounts"]]
        assert len(set(paths)) == len(paths)


# What each setting does.


def test_labels_queue_and_annotations_of_every_pod(pods):
    for pod in pods.values():
        assert pod["metadata"]["labels"] == {
            "team": "vision",
            "example.com/cost-center": "4711",
            "kueue.x-k8s.io/queue-name": "vision",
            "kueue.x-k8s.io/priority-class": "nightly",
        }
        assert pod["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false", "note": "any text: with spaces"}


def test_all_required_rules_are_one_term(pods):
    """Kubernetes asks for any one of several terms, but for all expressions of a term."""
    common = [
        {"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["a", "b"]},
        {"key": "node.kubernetes.io/spot", "operator": "DoesNotExist"},
    ]
    for name, pod in pods.items():
        own = [{"key": "gpu-count", "operator": "Gt", "values": ["3"]}] if name == "train" else []
        affinity = pod["spec"]["affinity"]["nodeAffinity"]
        (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert term["matchExpressions"] == common + own, name
        weights = [each["weight"] for each in affinity["preferredDuringSchedulingIgnoredDuringExecution"]]
        assert weights == ([30, 70] if name == "train" else [30])


def test_every_pod_may_pull_its_image(pods):
    for pod in pods.values():
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}, {"name": "mirror"}]
        assert main(pod)["imagePullPolicy"] == "Always"


def test_proxy_and_certificates_of_every_pod(pods):
    bundle = "/etc/pixelclip-certificates/all.pem"
    expected = {
        "HTTP_PROXY": "http://proxy.example:3128",
        "HTTPS_PROXY": "http://proxy.example:3128",
        "NO_PROXY": ".svc,10.0.0.0/8",
    }
    expected |= {name.lower(): value for name, value in expected.items()}
    files = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO")
    expected |= dict.fromkeys(files, bundle)
    for pod in pods.values():
        given = {each["name"]: each["value"] for each in main(pod)["env"] if "value" in each}
        assert expected.items() <= given.items()
        mounts = {each["mountPath"]: each["name"] for each in main(pod)["volumeMounts"]}
        assert mounts["/etc/pixelclip-certificates"] == "company-ca"


def test_certificates_may_come_from_a_secret(tmp_path):
    settings = "certificates: {secret: company-ca, mount: /ca/}"
    for pod in pods_of(*compiled(tmp_path, settings)[:2]).values():
        kubernetes_validate.validate(pod, "1.37", strict=True)
        assert {"name": "company-ca", "secret": {"secretName": "company-ca", "optional": False}} in pod["spec"]["volumes"]
        assert {"name": "SSL_CERT_FILE", "value": "/ca/ca-bundle.crt"} in main(pod)["env"]


def test_default_proxy_list_reaches_the_cluster_directly(tmp_path):
    pods = pods_of(*compiled(tmp_path, "proxy: {https: 'http://proxy.example:3128'}")[:2])
    given = {each["name"]: each.get("value") for each in main(pods["train"])["env"]}
    assert {".svc", ".cluster.local", "$(KUBERNETES_SERVICE_HOST)", "mlflow.mlflow"} <= set(given["NO_PROXY"].split(","))
    assert "HTTP_PROXY" not in given and given["no_proxy"] == given["NO_PROXY"]


def test_restricted_pods_run_without_root_and_write_to_volumes(pods):
    for pod in pods.values():
        security = main(pod)["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, 1234, 4321)
        mounts = {each["mountPath"]: each["name"] for each in main(pod)["volumeMounts"]}
        sources = {each["name"]: each for each in pod["spec"]["volumes"]}
        assert sources[mounts["/tmp"]]["emptyDir"] == {"sizeLimit": "20Gi"}
        assert sources[mounts["/work"]]["emptyDir"] == {}


def test_writable_folders_are_the_home_and_the_working_folder_of_the_image():
    text = (Path(__file__).parents[2] / "Dockerfile").read_text()
    assert re.search(r"\bHOME=(\S+)", text)[1] == "/tmp"
    assert re.search(r"^WORKDIR (/work)$", text, re.MULTILINE)
    assert set(re.findall(r"(?:MPLCONFIGDIR|DVC_SITE_CACHE_DIR)=(/\w+)", text)) == {"/tmp"}


def test_gpus_of_amd_and_parts_of_gpus(pods):
    assert main(pods["train"])["resources"]["limits"]["amd.com/gpu"] == "2"
    assert pods["train"]["spec"]["tolerations"] == [{"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert main(pods["masks"])["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == "1"


def test_default_settings_add_nothing(tmp_path):
    for pod in pods_of(*compiled(tmp_path, "parts: 1")[:2]).values():
        assert pod["metadata"] == {"name": "a", "namespace": "kubeflow"}
        assert "affinity" not in pod["spec"] and "runAsUser" not in main(pod)["securityContext"]
        assert not any("PROXY" in each["name"] or "CERT" in each["name"] for each in main(pod)["env"])


# Nodes of the TrainJob.


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "cluster.yaml").write_text(EVERYTHING)
    monkeypatch.setenv("PIXELCLIP_PIPELINE_RUN", "0ab1")
    draft = template(read(tmp_path / "cluster.yaml"), 3, "r/p:1")
    return complete(draft, Path("/workspace/a/masks"), Path("/workspace/a/train"), TrainConfig())


def test_trainjob_with_every_setting_fits_the_published_models(job):
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job


def test_nodes_of_the_trainjob_are_placed_like_the_step_train(job, pods):
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "vision"
    (node,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    patch = node["template"]["spec"]["template"]
    assert patch["metadata"]["labels"] == {"team": "vision", "example.com/cost-center": "4711"}
    for part in ("affinity", "tolerations", "nodeSelector", "imagePullSecrets"):
        assert patch["spec"][part] == pods["train"]["spec"][part]
    (container,) = patch["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    writable = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert writable == {"/workspace", "/dev/shm", "/tmp", "/work", "/etc/pixelclip-certificates"}
    assert {each["name"] for each in patch["spec"]["volumes"]} == {each["name"] for each in container["volumeMounts"]}
    given = {each["name"]: each.get("value") for each in job["spec"]["trainer"]["env"]}
    assert given["https_proxy"] == "http://proxy.example:3128" and given["SSL_CERT_FILE"].endswith("/all.pem")


# Errors.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "pods: {topology_spread: []}",
            "kfp-kubernetes cannot set topologySpreadConstraints of a step's pod; an administrator",
        ),
        ("pods: {priority_class: a}", "priorityClassName (Kueue's is the key `priority`)"),
        ("pods: {fs_group: 1}", "cannot set securityContext.fsGroup"),
        ("pods: {readOnlyRootFilesystem: true}", "cannot set securityContext.readOnlyRootFilesystem"),
        ("pods: {lables: {a: b}}", "pods: unknown key 'lables', did you mean 'labels'?"),
        ("pods: {priority: high}", "pods: priority 'high' without queue"),
        ("pods: {queue: 'a b'}", "pods.queue: 'a b' must have at most 63 letters"),
        ("pods: {labels: {team: 7}}", "must be text; quote it: '...' (found 7)"),
        ("pods: {labels: {'a b': c}}", "'a b' must be a Kubernetes key"),
        ("pods: {labels: {pipeline/runid: c}}", "'pipeline/runid' belongs to KFP"),
        ("pods: {queue: a, labels: {kueue.x-k8s.io/queue-name: b}}", "is already set by queue or priority"),
        ("pods: {annotations: {a: '{{workflow.name}}'}}", "must not contain '{{'"),
        ("pods: {node_affinity: [{key: a, operator: In}]}", "operator In with values []: In and NotIn need values"),
        ("pods: {node_affinity: [{key: a, operator: Gt, values: [many]}]}", "Gt and Lt one integer"),
        ("pods: {user: 0}", "pods.user: Input should be greater than or equal to 1"),
        ("proxy: {https: 'http://bot:geheim@proxy:3128'}", "proxy: https http://proxy:3128 contains credentials"),
        ("proxy: {http: 'proxy:3128'}", "http 'proxy:3128' must be a URL"),
        ("certificates: {config_map: a, secret: b}", "certificates: config_map 'a' and secret 'b': give only one"),
        ("certificates: {config_map: a.b}", "certificates.config_map: 'a.b' must be a DNS label"),
        ("{volume: {claim: a}, certificates: {secret: a}}", "both are named 'a'"),
        ("volume: {claim: dshm}", "'dshm' is the name of another volume"),
        (
            "{proxy: {http: 'http://p:1'}, secrets: [{name: a, env: {HTTP_PROXY: k}}]}",
            "proxy: also defined in secrets or config_maps: HTTP_PROXY",
        ),
        ("steps: {train: {gpus: 2, gpu_type: nvidia.com/mig-1g.10gb}}", "CUDA shows a process only one part of a GPU"),
        ("steps: {train: {gpu_type: h100}}", "steps.train.gpu_type: String should match pattern"),
    ],
)
def test_error_names_the_setting(tmp_path, text, message):
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(tmp_path / "cluster.yaml")
    assert "geheim" not in str(error.value)


def test_command_line_prints_the_error_in_one_line(tmp_path):
    (tmp_path / "cluster.yaml").write_text("pods: {topology_spread: []}")
    words = ["pipeline", "compile", "--out", str(tmp_path / "p.yaml"), "--cluster", str(tmp_path / "cluster.yaml")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code != 0 and not (tmp_path / "p.yaml").exists()
