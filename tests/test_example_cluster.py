"""Manifests of `examples/cluster`, built by `kubectl kustomize`, against the schemas of Kubernetes and KServe's types."""

import json
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import typer
import yaml
from kfp.components import load_component_from_file

from helpers import kserve
from pixelclip.cli.app import app
from pixelclip.commands.serve import manifest
from pixelclip_pipelines.cluster_config import Cluster, read
from pixelclip_pipelines.run import compile_to

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "cluster"
RUNS = ("cpu", "gpu", "multi-node")
SECRETS = list(yaml.safe_load_all((EXAMPLE / "secrets.example.yaml").read_text()))


def built(folder: str) -> list[dict]:
    words = [str(Path(sys.executable).with_name("kubectl")), "kustomize", str(EXAMPLE / folder)]
    return list(yaml.safe_load_all(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


@pytest.fixture(scope="module", params=RUNS)
def overlay(request) -> tuple[str, list[dict], Cluster]:
    return request.param, built(f"overlays/{request.param}"), read(EXAMPLE / "overlays" / request.param / "cluster.yaml")


def one(manifests: list[dict], kind: str, name: str) -> dict:
    (found,) = [each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_manifests_are_valid_kubernetes(overlay, version):
    for entry in [*overlay[1], *SECRETS, *built("workspace-owner"), *built("gc")]:
        kubernetes_validate.validate(entry, version, strict=True)
        assert entry["kind"] == "Secret" or entry["metadata"]["namespace"] == "kubeflow"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(overlay[1][0] | {"imagePullSecret": []}, version, strict=True)


def test_every_file_belongs_to_a_kustomization():
    built_from = {EXAMPLE / name for name in ("README.md", "secrets.example.yaml", "administrator/pod-spec.yaml")}
    for path in EXAMPLE.rglob("kustomization.yaml"):
        document = yaml.safe_load(path.read_text())
        built_from |= {path, path.parent / "cluster.yaml"}
        for name in document["resources"]:
            assert (path.parent / name).exists(), f"{path}: {name}"
            built_from.add((path.parent / name).resolve())
    assert {path for path in EXAMPLE.rglob("*") if path.is_file()} <= built_from


def test_cluster_yaml_names_what_the_manifests_create(overlay):
    _, manifests, cluster = overlay
    account = one(manifests, "ServiceAccount", cluster.service_account)
    assert [each["name"] for each in account["imagePullSecrets"]] == cluster.pull_secrets
    claim = one(manifests, "PersistentVolumeClaim", cluster.volume.claim)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for source in cluster.config_maps:
        assert set(source.env.values()) <= set(one(manifests, "ConfigMap", source.name)["data"])
    for source in cluster.secrets:
        assert set(source.env.values()) <= set(one(SECRETS, "Secret", source.name)["stringData"])
    assert {each["metadata"]["name"] for each in SECRETS} == {*cluster.pull_secrets, *(each.name for each in cluster.secrets)}


def test_roles_are_bound_to_the_service_account_of_the_runs(overlay):
    name, manifests, cluster = overlay
    subject = {"kind": "ServiceAccount", "name": cluster.service_account, "namespace": "kubeflow"}
    bindings = [each for each in manifests if each["kind"] == "RoleBinding"]
    assert all(each["subjects"] == [subject] for each in bindings)
    roles = {each["roleRef"]["name"] for each in bindings}
    assert roles == {"pipeline-runner"} | ({"pixelclip-trainer"} if name == "multi-node" else set())
    if name == "multi-node":
        jobs = {
            "apiGroups": ["trainer.kubeflow.org"],
            "resources": ["trainjobs"],
            "verbs": ["create", "get", "update", "delete"],
        }
        pods = {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}
        assert one(manifests, "Role", "pixelclip-trainer")["rules"] == [jobs, pods]


def test_pipeline_compiles_with_the_settings_of_every_overlay(overlay, tmp_path, monkeypatch):
    name, _, cluster = overlay
    monkeypatch.delenv("PIXELCLIP_IMAGE", raising=False)
    path = tmp_path / "pipeline.yaml"
    compile_to(path, EXAMPLE / "overlays" / name / "cluster.yaml", nodes=4 if name == "multi-node" else 1)
    assert load_component_from_file(str(path)).component_spec.name == "pixelclip"
    gpus = {step.gpus for step in cluster.steps.values()}
    assert (gpus == {0}) == (name == "cpu")


def test_no_manifest_contains_a_secret():
    assert not [each for name in RUNS for each in built(f"overlays/{name}") if each["kind"] == "Secret"]
    values = [value for each in SECRETS for value in each["stringData"].values()]
    assert set(values) == {"", '{"auths": {}}'}


def test_serving_is_the_output_of_the_command_with_secrets():
    image, mlflow = "registry.example/pixelclip:1", "http://mlflow.mlflow:5000"
    text = (EXAMPLE / "overlays/serving/inference-service.yaml").read_text()
    assert text == manifest("models:/pixelclip@champion", image, mlflow, follow=30)
    (service,) = built("overlays/serving")
    pod = kserve.check(service)
    assert pod["imagePullSecrets"] == [{"name": "pixelclip-registry"}]
    (container,) = pod["containers"]
    references = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in container["env"] if "valueFrom" in each}
    for name, reference in references.items():
        assert name in one(SECRETS, "Secret", reference["name"])["stringData"] and reference["key"] == name
    assert references.keys() == {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}


def test_job_of_the_workspace_gives_it_to_the_user_of_the_image():
    (job,) = built("workspace-owner")
    pod = job["spec"]["template"]["spec"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "pixelclip-workspace"
    user = re.search(r"^USER (\d+:\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    assert pod["containers"][0]["command"] == ["chown", user, pod["containers"][0]["volumeMounts"][0]["mountPath"]]


def test_job_that_deletes_names_what_the_manifests_create(overlay):
    (job,) = built("gc")
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (_, word, *words) = [*container["command"], *container["args"]]
    typer.main.get_command(app).commands[word].make_context(word, list(words))  # raises UsageError
    for source in container["envFrom"]:
        (kind, reference) = next(iter(source.items()))
        if kind == "configMapRef":
            assert "MLFLOW_TRACKING_URI" in one(overlay[1], "ConfigMap", reference["name"])["data"]
        else:
            assert one(SECRETS, "Secret", reference["name"]) and reference["optional"]
    assert one(overlay[1], "PersistentVolumeClaim", pod["volumes"][0]["persistentVolumeClaim"]["claimName"])
    assert container["volumeMounts"][0]["mountPath"] == overlay[2].volume.mount


def test_what_the_administrator_sets_is_a_valid_pod_spec():
    patch = yaml.safe_load((EXAMPLE / "administrator" / "pod-spec.yaml").read_text())
    spec = {**patch, "containers": [{"name": "main", "image": "a:1"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
    kubernetes_validate.validate(pod, "1.37", strict=True)
    assert patch["securityContext"]["fsGroup"] == 1000


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "cluster.md").read_text()
    return [body for tag, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S) if tag == language]


def test_settings_in_the_documentation_are_valid():
    for block in blocks("yaml"):
        settings = yaml.safe_load(block)
        given = Cluster.model_validate(settings).model_dump(exclude_unset=True)
        assert settings.keys() <= given.keys()
    assert len(blocks("yaml")) == 3


def test_documented_command_makes_the_patch_of_the_api_server():
    (block,) = [block for block in blocks("") if "COMPILED_PIPELINE_SPEC_PATCH" in block]
    make = block.partition("kubectl")[0].replace("python3", sys.executable) + 'printf %s "$patch"'
    result = subprocess.run(["bash", "-ec", make], check=True, cwd=ROOT, capture_output=True, text=True)
    patch = json.loads(result.stdout)
    assert json.loads(patch.pop("podSpecPatch")) == yaml.safe_load((EXAMPLE / "administrator" / "pod-spec.yaml").read_text())
    assert patch == {}
