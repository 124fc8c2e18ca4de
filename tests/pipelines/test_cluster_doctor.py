"""Checks of a cluster: the kubernetes client against a small server of its API."""

import json
from pathlib import Path

import pytest

from helpers.command_line import pixelclip  # noqa: F401
from helpers.kfp_server import fake_kfp
from helpers.kubernetes_server import fake_cluster
from pixelclip_pipelines.submit import ENDPOINTS

SETTINGS = """
service_account: runner
pull_secrets: [registry]
volume: {claim: shared}
secrets:
  - {name: s3, env: {AWS_ACCESS_KEY_ID: id, AWS_SECRET_ACCESS_KEY: key}}
  - {name: login, env: {MLFLOW_TRACKING_PASSWORD: password}, optional: true}
config_maps:
  - {name: places, env: {PIXELCLIP_MLFLOW_URI: mlflow}}
  - {name: places, env: {AWS_ENDPOINT_URL: s3}, optional: true}
steps:
  train: {gpus: 4, node_selector: {pool: h100}}
"""
GPU = ("nvidia.com/gpu", "", "NoSchedule")
TRAINER = "/apis/trainer.kubeflow.org/v1alpha1"


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """A cluster with all that a run on two nodes needs."""
    for name in (*ENDPOINTS, "PIXELCLIP_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # no docker
    kubeconfig = tmp_path / "kubeconfig"
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text(SETTINGS)
    with fake_cluster(kubeconfig) as server:
        server.add("configmaps", "places", data={"mlflow": "http://mlflow"})
        server.add("secrets", "s3", data={"id": "aWQ=", "key": "a2V5"})
        server.add("secrets", "registry", data={})
        server.add("serviceaccounts", "runner")
        claim = {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"}}
        server.add("persistentvolumeclaims", "shared", **claim)
        for name in ("a", "b"):
            server.node(name, {"pool": "h100"}, [GPU], cpu="64", memory="512Gi", nvidia_com__gpu="8")
        server.node("small", cpu="8", memory="32Gi")
        server.objects[TRAINER] = {"groupVersion": TRAINER[6:], "resources": [resource("trainjobs")]}
        server.objects[f"{TRAINER}/clustertrainingruntimes/torch-distributed"] = {"metadata": {}}
        server.verbs = {"create", "get", "delete"}
        yield server


def resource(name):
    return {"name": name, "singularName": "", "namespaced": True, "kind": "TrainJob", "verbs": []}


@pytest.fixture
def doctor(pixelclip):  # noqa: F811
    """Run the command; return its exit code and the findings by name."""

    def run(*words):
        code, out, err = pixelclip("pipeline", "doctor", "--json", *words)
        assert err == ""
        return code, {each["what"]: (each["state"], each["said"], each["advice"]) for each in json.loads(out)}

    return run


def test_complete_cluster(cluster, doctor):
    code, found = doctor("--nodes", "2")
    assert code == 0
    assert {what: state for what, (state, _, _) in found.items() if state != "ok"} == {
        "KFP": "not configured",
        "image": "missing",  # docker is not installed
        "Secret login": "not configured",
    }
    assert found["nodes for train"][1] == "2 of 3 have 8 cpu, 32Gi memory, 4 nvidia.com/gpu"
    assert found["ConfigMap places"][1] == "has all keys but the optional s3"
    assert {spec["user"] for spec in cluster.reviewed} == {"system:serviceaccount:kubeflow:runner"}


def test_each_missing_object_is_named(cluster, doctor):
    kept = dict(cluster.objects)
    for path, what, said in [
        ("configmaps/places", "ConfigMap places", "not in namespace kubeflow; steps cannot start without it"),
        ("secrets/s3", "Secret s3", "not in namespace kubeflow; steps cannot start without it"),
        ("secrets/registry", "Secret registry", "does not exist"),
        ("serviceaccounts/runner", "service account runner", "does not exist"),
        ("persistentvolumeclaims/shared", "claim shared", "not in namespace kubeflow"),
    ]:
        cluster.objects = {key: value for key, value in kept.items() if not key.endswith(path)}
        code, found = doctor()
        assert code == 1 and found[what][:2] == ("failed", said)
        assert [name for name, (state, *_) in found.items() if state == "failed"] == [what]


def test_missing_key_and_advice(cluster, doctor):
    cluster.add("secrets", "s3", data={"id": "aWQ="})
    del cluster.objects["/api/v1/namespaces/kubeflow/configmaps/places"]
    _, found = doctor()
    assert found["Secret s3"] == ("failed", "has no key key; steps cannot start without it", "its keys are id")
    assert found["ConfigMap places"][2] == "kubectl -n kubeflow create configmap places --from-literal=mlflow=..."


def test_claim_for_one_node_only(cluster, doctor):
    claim = {"spec": {"accessModes": ["ReadWriteOnce"]}, "status": {"phase": "Bound"}}
    cluster.add("persistentvolumeclaims", "shared", **claim)
    assert doctor()[1]["claim shared"][:2] == ("failed", "access modes ReadWriteOnce")


@pytest.mark.parametrize(
    ("steps", "words", "said", "advice"),
    [
        (
            "{train: {gpus: 16}}",
            (),
            "no node has 16 nvidia.com/gpu",
            "the most that a node has: 64 cpu, 512Gi memory, 8 nvidia",
        ),
        ("{train: {node_selector: {pool: b200}}}", (), "no node has the labels {'pool': 'b200'}", ""),
        ("{train: {memory: 1024Gi, memory_limit: 2048Gi}}", (), "no node of those left has 1024Gi memory", "512Gi memory"),
        (
            "{train: {tolerations: [{key: other}]}}",
            (),
            "2 nodes would fit, but for their taints nvidia.com/gpu:NoSchedule",
            "add",
        ),
        ("{}", ("--nodes", "3"), "2 nodes have 8 cpu, 32Gi memory, 1 nvidia.com/gpu, --nodes 3 needs 3", ""),
    ],
)
def test_steps_without_a_node(cluster, doctor, steps, words, said, advice):
    Path("cluster.yaml").write_text(f"{{service_account: runner, volume: {{claim: shared}}, steps: {steps}}}")
    code, found = doctor(*words)
    (failed,) = [each for what, each in found.items() if what.startswith("nodes for") and each[0] == "failed"]
    assert code == 1 and failed[1] == said and advice in failed[2]


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        ("{key: team, operator: Equal, value: a}", True),
        ("{key: team, operator: Equal, value: b}", False),
        ("{key: team}", True),
        ("{key: team, effect: NoExecute}", False),
        ("{}", True),
    ],
)
def test_tolerations_as_kubernetes_applies_them(cluster, doctor, toleration, tolerated):
    cluster.objects["/api/v1/nodes"]["items"] = []
    cluster.node("a", taints=[("team", "a", "NoSchedule"), ("soft", "", "PreferNoSchedule")], cpu="64", memory="512Gi")
    Path("cluster.yaml").write_text(f"steps: {{shards: {{cpu: 3, cpu_limit: 4, tolerations: [{toleration}]}}}}")
    assert (doctor()[1]["nodes for shards"][0] == "ok") == tolerated


def test_cordoned_nodes_do_not_count(cluster, doctor):
    for node in cluster.objects["/api/v1/nodes"]["items"]:
        node["spec"]["unschedulable"] = True
    _, found = doctor()
    assert all(state == "failed" for what, (state, *_) in found.items() if what.startswith("nodes for"))


def test_trainer_is_checked_for_several_nodes_only(cluster, doctor):
    cluster.verbs = {"get"}
    del cluster.objects[f"{TRAINER}/clustertrainingruntimes/torch-distributed"]
    assert "TrainJob" not in doctor()[1]
    code, found = doctor("--nodes", "2")
    assert code == 1 and found["rights of runner"][:2] == ("failed", "may not create, delete TrainJobs")
    assert found["runtime torch-distributed"][:2] == ("failed", "does not exist")
    del cluster.objects[TRAINER]
    _, found = doctor("--nodes", "2")
    assert found["TrainJob"][:2] == ("failed", "trainjobs.trainer.kubeflow.org is not installed")


def test_what_may_not_be_read_is_not_a_failure(cluster, doctor):
    cluster.refused = {"/api/v1/nodes", "/api/v1/namespaces/kubeflow/secrets/s3"}
    code, found = doctor()
    assert code == 0 and found["nodes"][:2] == found["Secret s3"][:2] == ("missing", "not checked: 403 Forbidden")


def test_no_kubeconfig_and_no_server(cluster, doctor):
    Path("kubeconfig").write_text(Path("kubeconfig").read_text().replace(cluster.url, "http://127.0.0.1:9"))
    code, found = doctor()
    assert code == 1 and found["Kubernetes"][1].startswith("http://127.0.0.1:9 cannot be reached")
    Path("kubeconfig").unlink()
    with fake_kfp() as kfp:
        code, found = doctor("--endpoint", kfp.url)
    assert code == 0 and found["Kubernetes"][:2] == ("not configured", "no kubeconfig") and found["KFP"][0] == "ok"


@pytest.mark.parametrize(("kind", "what"), [("config_map", "ConfigMap"), ("secret", "Secret")])
def test_certificates_need_their_key(cluster, doctor, kind, what):
    Path("cluster.yaml").write_text(f"{SETTINGS}certificates: {{{kind}: company-ca, key: all.pem}}\n")
    code, found = doctor()
    assert code == 1 and found[f"{what} company-ca"][0] == "failed"
    cluster.add(f"{what.lower()}s", "company-ca", data={"other": "YQ=="})
    assert "has no key all.pem" in doctor()[1][f"{what} company-ca"][1]
    cluster.add(f"{what.lower()}s", "company-ca", data={"all.pem": "YQ=="})
    assert doctor()[1][f"{what} company-ca"][0] == "ok"


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ("key: pool, operator: In, values: [h100, a100]", True),
        ("key: pool, operator: In, values: [a100]", False),
        ("key: pool, operator: NotIn, values: [a100]", True),
        ("key: zone, operator: NotIn, values: [a]", True),
        ("key: pool, operator: Exists", True),
        ("key: zone, operator: Exists", False),
        ("key: pool, operator: DoesNotExist", False),
        ("key: gpus, operator: Gt, values: ['7']", True),
        ("key: gpus, operator: Gt, values: ['8']", False),
        ("key: gpus, operator: Lt, values: ['9']", True),
        ("key: pool, operator: Lt, values: ['9']", False),
        ("key: zone, operator: In, values: [a], weight: 5", True),
    ],
)
def test_nodes_must_fulfil_the_required_rules(cluster, doctor, rule, fits):
    """The expected answers follow Kubernetes' description of its operators."""
    for name in ("a", "b"):
        cluster.node(name, {"pool": "h100", "gpus": "8"}, [GPU], cpu="64", memory="512Gi", nvidia_com__gpu="8")
    Path("cluster.yaml").write_text(SETTINGS.replace("{gpus: 4,", f"{{node_affinity: [{{{rule}}}], gpus: 4,"))
    state, said, _ = doctor()[1]["nodes for train"]
    assert (state == "ok") == fits, said
    assert fits or "node_affinity" in said
