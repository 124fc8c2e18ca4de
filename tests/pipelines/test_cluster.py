"""Settings of the cluster, and the compiled pipeline with a golden copy.

The golden copy is renewed by `PIXELCLIP_RENEW=1 python -m pytest tests/pipelines/test_cluster.py -k golden`.
"""

import difflib
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from kfp.components import load_component_from_file
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

from helpers.compiling import compiled
from pixelclip.config import TrainConfig
from pixelclip_pipelines.cluster_config import STEPS, Cluster, Step, image_of, read
from pixelclip_pipelines.cluster_sections import Source, seconds
from pixelclip_pipelines.trainjob import complete, template

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden" / "pipeline.yaml"
SETTINGS = """
image: registry.example/pixelclip@sha256:DIGEST
pull_policy: IfNotPresent
pull_secrets: [registry]
parts: 3
parallel: 2
secrets:
  - {name: store, env: {AWS_ACCESS_KEY_ID: key, AWS_SECRET_ACCESS_KEY: secret}}
  - {name: tracking, env: {MLFLOW_TRACKING_PASSWORD: password}, optional: true}
config_maps:
  - {name: places, env: {PIXELCLIP_MLFLOW_URI: mlflow}}
volume: {claim: shared, mount: /workspace}
run: {deadline: 7d, ttl_success: 2d, ttl_failure: 14d}
steps:
  masks: {gpus: 1, gpu_type: nvidia.com/mig-1g.10gb}
  train:
    gpus: 4
    node_selector: {nvidia.com/gpu.product: H100}
    tolerations: [{key: nvidia.com/gpu, effect: NoSchedule}, {key: team, operator: Equal, value: vision}]
    shared_memory: 64Gi
    timeout: 3h
    retries: 5
    backoff: 2m
    backoff_factor: 3
""".replace("DIGEST", "ab" * 32)
SECRET = "a-value-that-must-never-be-written"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(name, SECRET)
        return compiled(tmp_path_factory.mktemp("compiled"), SETTINGS)


@pytest.fixture(scope="module")
def several_nodes(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("nodes"), SETTINGS, nodes=2)


def tasks(spec: dict) -> dict[str, dict]:
    """Return the tasks of all DAGs of the pipeline."""
    dags = [spec["root"]["dag"], *(each["dag"] for each in spec["components"].values() if "dag" in each)]
    return {name: task for dag in dags for name, task in dag["tasks"].items()}


def containers(spec: dict) -> dict[str, dict]:
    return {name: executor["container"] for name, executor in spec["deploymentSpec"]["executors"].items()}


def pods(platform: dict) -> dict[str, dict]:
    return platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


# Order of the steps.


def test_dag_runs_inside_an_exit_handler(pipeline):
    spec, _, _ = pipeline
    root = spec["root"]["dag"]["tasks"]
    assert set(root) == {"exit-handler-1", "finish"}
    assert root["finish"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert root["finish"]["inputs"]["parameters"]["nodes"] == {"runtimeValue": {"constant": 1.0}}
    assert root["finish"]["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}
    inner = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    loop = next(name for name in inner if name.startswith("for-loop"))
    assert {name: set(task.get("dependentTasks", [])) for name, task in inner.items()} == {
        "pin-revision": set(),
        "fetch-data": {"pin-revision"},
        "fetch-labelled": {"pin-revision"},
        "shards": {"fetch-data", "pin-revision"},
        loop: {"shards", "pin-revision"},
        "train": {loop, "pin-revision"},
        "evaluate-clip": {"pin-revision", "fetch-labelled"},
        "evaluate": {"fetch-labelled", "train", "evaluate-clip", "pin-revision"},
        "register": {"evaluate", "train", "pin-revision"},
    }


def test_both_datasets_are_read_at_one_commit(pipeline):
    fetches = [task for name, task in tasks(pipeline[0]).items() if name.startswith("fetch-")]
    for task in fetches:
        revision = task["inputs"]["parameters"]["revision"]
        assert revision == {"taskOutputParameter": {"outputParameterKey": "commit", "producerTask": "pin-revision"}}
    paths = [task["inputs"]["parameters"]["path"]["componentInputParameter"] for task in fetches]
    assert paths == ["pipelinechannel--data_images", "pipelinechannel--data_labelled"]


def test_masks_fan_out_over_the_parts_and_train_collects_them(pipeline):
    spec, _, _ = pipeline
    (loop,) = [task for name, task in tasks(spec).items() if name.startswith("for-loop")]
    assert json.loads(loop["parameterIterator"]["items"]["raw"]) == ["1/3", "2/3", "3/3"]
    assert loop["iteratorPolicy"]["parallelismLimit"] == 2
    (inner,) = spec["components"][loop["componentRef"]["name"]]["dag"]["tasks"].values()
    assert inner["componentRef"]["name"] == "comp-masks"
    given = tasks(spec)["train"]["inputs"]["artifacts"]
    assert set(given) == {"parts"} and given["parts"]["taskOutputArtifact"]["producerTask"].startswith("for-loop")
    assert spec["components"]["comp-train"]["inputDefinitions"]["artifacts"]["parts"]["isArtifactList"]


def test_one_part_compiles_without_a_loop(tmp_path):
    spec, _, _ = compiled(tmp_path, "parts: 1")
    assert not any(name.startswith("for-loop") for name in tasks(spec))
    assert tasks(spec)["masks"]["inputs"]["parameters"]["part"] == {"runtimeValue": {"constant": ""}}
    assert set(tasks(spec)["train"]["inputs"]["artifacts"]) == {"masks"}


# Pods.


def test_every_step_uses_the_image_digest(pipeline):
    images = {container["image"] for container in containers(pipeline[0]).values()}
    assert images == {f"registry.example/pixelclip@sha256:{'ab' * 32}"}


def test_image_option_overrides_environment_and_file(monkeypatch):
    monkeypatch.delenv("PIXELCLIP_IMAGE", raising=False)
    cluster = Cluster(image="c:1")
    assert image_of(cluster) == "c:1"
    monkeypatch.setenv("PIXELCLIP_IMAGE", "e:1")
    assert (image_of(cluster), image_of(cluster, "localhost:5000/g:1")) == ("e:1", "localhost:5000/g:1")
    for wrong in ("g", "g@sha256:12", "g:", "http://g:1", "g:a b"):
        with pytest.raises(ValueError, match="must end with a tag"):
            image_of(cluster, wrong)


def test_gpus_cpu_and_memory(pipeline):
    resources = {name: container["resources"] for name, container in containers(pipeline[0]).items()}
    train = resources["exec-train"]
    assert train["accelerator"] == {
        "count": "4",
        "resourceCount": "4",
        "type": "nvidia.com/gpu",
        "resourceType": "nvidia.com/gpu",
    }
    assert (train["resourceCpuRequest"], train["resourceCpuLimit"]) == ("8", "16")
    assert (train["resourceMemoryRequest"], train["resourceMemoryLimit"]) == ("32Gi", "96Gi")
    assert resources["exec-masks"]["accelerator"]["resourceType"] == "nvidia.com/mig-1g.10gb"
    assert resources["exec-evaluate"]["accelerator"]["resourceCount"] == "1"
    on_gpus = {name for name, found in resources.items() if "accelerator" in found}
    assert on_gpus == {"exec-masks", "exec-train", "exec-evaluate", "exec-evaluate-clip"}
    assert resources["exec-evaluate-clip"] == resources["exec-evaluate"]
    for name, found in resources.items():
        for key in ("resourceCpuRequest", "resourceCpuLimit", "resourceMemoryRequest", "resourceMemoryLimit"):
            assert found[key], (name, key)


def test_zero_gpus_request_no_accelerator(tmp_path):
    none = "{gpus: 0}"
    spec, platform, _ = compiled(
        tmp_path, f"steps: {{{', '.join(f'{step}: {none}' for step in ('train', 'evaluate', 'evaluate_clip'))}}}"
    )
    assert not any("accelerator" in container["resources"] for container in containers(spec).values())
    assert not any("tolerations" in pod for pod in pods(platform).values())


def test_tolerations_and_node_selector(pipeline):
    train = pods(pipeline[1])["exec-train"]
    assert train["nodeSelector"] == {"labels": {"nvidia.com/gpu.product": "H100"}}
    assert train["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "vision"},
    ]
    assert "nodeSelector" not in pods(pipeline[1])["exec-shards"]


def test_steps_with_gpus_tolerate_the_gpu_taint(pipeline, tmp_path):
    taint = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    found = {name: pod.get("tolerations") for name, pod in pods(pipeline[1]).items()}
    assert found.pop("exec-train") != taint, "given tolerations replace the default"
    assert {name for name, tolerations in found.items() if tolerations} == {"exec-masks", "exec-evaluate", "exec-evaluate-clip"}
    assert found["exec-masks"] == found["exec-evaluate"] == taint
    amd = Step(gpus=1, gpu_type="amd.com/gpu").pod_tolerations
    assert [each["key"] for each in amd] == ["amd.com/gpu"]


def test_shared_memory(pipeline):
    mounts = {name: pod["emptyDirMounts"] for name, pod in pods(pipeline[1]).items() if "emptyDirMounts" in pod}
    assert mounts["exec-train"] == [
        {"medium": "Memory", "mountPath": "/dev/shm", "sizeLimit": "64Gi", "volumeName": "dshm"},
    ]
    assert set(mounts) == {"exec-train", "exec-masks", "exec-evaluate", "exec-evaluate-clip"}


def test_every_step_has_a_timeout_and_retries_with_backoff(pipeline):
    spec, platform, _ = pipeline
    assert pods(platform)["exec-train"]["activeDeadlineSeconds"] == str(3 * 3600)
    assert all(int(pod["activeDeadlineSeconds"]) > 0 for pod in pods(platform).values())
    own = {name: task for name, task in tasks(spec).items() if not name.startswith(("exit-handler", "for-loop"))}
    assert own["train"]["retryPolicy"] == {
        "maxRetryCount": 5,
        "backoffDuration": "120s",
        "backoffFactor": 3.0,
        "backoffMaxDuration": f"{6 * 3 * 3600 + 120 * (1 + 3 + 9 + 27 + 81)}s",
    }
    for name, task in own.items():
        retry, timeout = task["retryPolicy"], int(pods(platform)[f"exec-{name}"]["activeDeadlineSeconds"])
        assert retry["maxRetryCount"] >= 2 and int(retry["backoffDuration"][:-1]) > 0, name
        # Argo ends all attempts this long after the start of the first, so all of them must fit.
        assert int(retry["backoffMaxDuration"][:-1]) > (retry["maxRetryCount"] + 1) * timeout, name
        assert retry["backoffFactor"] == int(retry["backoffFactor"]), f"{name}: Argo requires a whole number"


def test_every_step_repeats_itself(pipeline, several_nodes):
    """KFP 2.17 does not repeat a failed container, so a supervisor takes the place of KFP's executor."""
    for spec, *_ in (pipeline, several_nodes):
        for name, container in containers(spec).items():
            step, command = name.removeprefix("exec-").removesuffix("-2").replace("-", "_"), " ".join(container["command"])
            step = "fetch_data" if step == "fetch_labelled" else step  # two steps with one entry in cluster.yaml
            assert f"python3 -m pixelclip_pipelines.supervisor --step {step} --retries " in command, name
            assert "--component_module_path" in command and "kfp.dsl.executor_main" not in command
    train = " ".join(containers(pipeline[0])["exec-train"]["command"])
    assert "--step train --retries 5 --backoff 120 --backoff-factor 3 " in train


def test_other_executor_of_kfp_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("pixelclip_pipelines.cluster_tasks._EXECUTOR", "python4 -m kfp.executor")
    with pytest.raises(ValueError, match="starts steps in a way that pixelclip does not support"):
        compiled(tmp_path, "parts: 1")


def test_only_steps_determined_by_their_parameters_are_cached(pipeline, several_nodes):
    for spec, *_ in (pipeline, several_nodes):
        cached = {name for name, task in tasks(spec).items() if task.get("cachingOptions", {}).get("enableCache")}
        groups = {name for name in cached if name.startswith(("exit-handler", "for-loop"))}
        assert cached - groups == {"fetch-data", "fetch-labelled", "evaluate-clip"}


def test_cache_key_of_the_clip_evaluation(pipeline):
    def output_of(task: str, key: str) -> dict:
        return {"taskOutputParameter": {"producerTask": task, "outputParameterKey": key}}

    given = tasks(pipeline[0])["evaluate-clip"]["inputs"]
    # The only training settings are the CLIP and, in clip_settings, side and residual, so a new model does not repeat the step.
    assert given["parameters"] == {
        "clip": output_of("pin-revision", "clip"),
        "clip_version": output_of("pin-revision", "clip_version"),
        "data_version": output_of("fetch-labelled", "version"),
        "settings": output_of("pin-revision", "clip_settings"),
        "workspace": {"componentInputParameter": "pipelinechannel--workspace"},
    }
    assert set(given["artifacts"]) == {"labelled"}
    # A cached fetch returns its old version, so only a commit may be its key.
    assert tasks(pipeline[0])["fetch-labelled"]["inputs"]["parameters"]["fetch"] == output_of("pin-revision", "fetch")
    form = pipeline[0]["root"]["inputDefinitions"]["parameters"]
    checked = tasks(pipeline[0])["pin-revision"]["inputs"]["parameters"]
    assert {name: checked[name] for name in form} == {
        name: {"componentInputParameter": f"pipelinechannel--{name}"} for name in form
    }
    evaluated = tasks(pipeline[0])["evaluate"]["inputs"]["artifacts"]["clip_evaluation"]
    assert evaluated == {"taskOutputArtifact": {"producerTask": "evaluate-clip", "outputArtifactKey": "clip_evaluation"}}


def test_secrets_and_config_maps_are_references(pipeline):
    _, platform, path = pipeline
    expected = {
        "store": ({"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY"}, False),
        "tracking": ({"password": "MLFLOW_TRACKING_PASSWORD"}, True),
    }
    for name, pod in pods(platform).items():
        secrets = {
            each["secretName"]: ({e["secretKey"]: e["envVar"] for e in each["keyToEnv"]}, each["optional"])
            for each in pod["secretAsEnv"]
        }
        assert secrets == expected, name
        (config,) = pod["configMapAsEnv"]
        assert config["configMapName"] == "places"
        assert config["keyToEnv"] == [{"configMapKey": "mlflow", "envVar": "PIXELCLIP_MLFLOW_URI"}]
        assert pod["imagePullSecret"][0]["secretName"] == "registry" and pod["imagePullPolicy"] == "IfNotPresent"
    assert SECRET not in path.read_text()


def test_literal_variables_are_image_and_gpus_only(pipeline, several_nodes):
    image = {"PIXELCLIP_IMAGE": f"registry.example/pixelclip@sha256:{'ab' * 32}"}
    gpus = {"exec-train": "4", "exec-masks": "1", "exec-evaluate": "1", "exec-evaluate-clip": "1"}
    for spec, _, _ in (pipeline, several_nodes):
        for name, container in containers(spec).items():
            found = {each["name"]: each["value"] for each in container["env"]}
            assert found == image | ({"PIXELCLIP_GPUS": gpus[name]} if name in gpus else {}), name


def test_every_step_and_node_gets_the_address_of_mlflows_pages(tmp_path):
    settings = "{mlflow_ui: 'https://mlflow.example', volume: {claim: shared}}"
    spec, _, _ = compiled(tmp_path, settings, nodes=2)
    expected = {"name": "PIXELCLIP_MLFLOW_UI", "value": "https://mlflow.example"}
    assert all(expected in container["env"] for container in containers(spec).values())
    assert expected in job_of(spec)["spec"]["trainer"]["env"]


def test_every_step_has_run_id_and_volume(pipeline):
    for name, pod in pods(pipeline[1]).items():
        assert pod["fieldPathAsEnv"] == [{"name": "PIXELCLIP_PIPELINE_RUN", "fieldPath": "metadata.labels['pipeline/runid']"}]
        (mount,) = pod["pvcMount"]
        assert (mount["constant"], mount["mountPath"]) == ("shared", "/workspace"), name


def test_artifact_types_on_the_kfp_page(pipeline):
    def kinds(step: str) -> set[str]:
        artifacts = pipeline[0]["components"][f"comp-{step}"]["outputDefinitions"]["artifacts"]
        return {each["artifactType"]["schemaTitle"].removeprefix("system.") for each in artifacts.values()}

    assert kinds("evaluate-clip") == {"Artifact"}
    assert kinds("evaluate") == {"Artifact", "Metrics", "ClassificationMetrics", "HTML"}
    assert kinds("register") == {"Artifact", "Markdown"}
    assert kinds("fetch-data") == {"Dataset"}
    assert kinds("train") == {"Model"}


# The compiled file.


def test_kfp_loads_the_compiled_pipeline(pipeline, several_nodes):
    for *_, path in (pipeline, several_nodes):
        assert load_component_from_file(str(path)).component_spec.name == "pixelclip"


def test_compiled_pipeline_equals_the_golden_copy(pipeline):
    text = pipeline[2].read_text()
    if os.environ.get("PIXELCLIP_RENEW"):
        GOLDEN.write_text(text)
    changed = difflib.unified_diff(
        GOLDEN.read_text().splitlines(), text.splitlines(), str(GOLDEN), "compiled now", lineterm="", n=3
    )
    shown = "\n".join(changed)
    assert not shown, f"the compiled pipeline changed; if that is intended, renew the golden copy (see above):\n{shown}"


def test_compilation_is_deterministic(pipeline, tmp_path):
    assert compiled(tmp_path, SETTINGS)[2].read_bytes() == pipeline[2].read_bytes()


# Several nodes.


def job_of(spec: dict) -> dict:
    return json.loads(tasks(spec)["train-job"]["inputs"]["parameters"]["job"]["runtimeValue"]["constant"])


def test_launcher_of_several_nodes_needs_no_gpu(several_nodes):
    spec, platform, _ = several_nodes
    assert "train" not in tasks(spec)
    launcher = containers(spec)["exec-train-job"]["resources"]
    assert "accelerator" not in launcher and launcher["resourceCpuLimit"] == "1"
    assert int(pods(platform)["exec-train-job"]["activeDeadlineSeconds"]) > job_of(spec)["spec"]["activeDeadlineSeconds"]


def test_exit_handler_deletes_the_trainjob_of_several_nodes(several_nodes):
    assert several_nodes[0]["root"]["dag"]["tasks"]["finish"]["inputs"]["parameters"]["nodes"] == {
        "runtimeValue": {"constant": 2.0}
    }


def test_trainjob_has_the_resources_of_train(several_nodes):
    spec = job_of(several_nodes[0])["spec"]
    trainer = spec["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], spec["activeDeadlineSeconds"]) == (2, 4, 3 * 3600)
    assert trainer["resourcesPerNode"] == {
        "requests": {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "4"},
        "limits": {"cpu": "16", "memory": "96Gi", "nvidia.com/gpu": "4"},
    }
    assert trainer["image"] == f"registry.example/pixelclip@sha256:{'ab' * 32}"
    assert [each for each in trainer["env"] if "value" in each] == [
        {"name": "PIXELCLIP_IMAGE", "value": trainer["image"]},
        {"name": "PIXELCLIP_GPUS", "value": "4"},
    ]
    named = [each for each in trainer["env"] if "valueFrom" in each]
    assert {each["name"]: next(iter(each["valueFrom"].values()))["name"] for each in named} == {
        "AWS_ACCESS_KEY_ID": "store",
        "AWS_SECRET_ACCESS_KEY": "store",
        "MLFLOW_TRACKING_PASSWORD": "tracking",
        "PIXELCLIP_MLFLOW_URI": "places",
    }
    (node,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "H100"}
    assert pod["tolerations"][1] == {"key": "team", "operator": "Equal", "value": "vision"}
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["securityContext"] == {"fsGroup": 1000}, "the user of the image may write to the volume"
    assert re.search(r"^USER 1000:1000$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    mounts = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"workspace": "/workspace", "dshm": "/dev/shm"}
    assert {each["name"] for each in pod["volumes"]} == set(mounts)


@pytest.mark.parametrize("settings", [SETTINGS, "volume: {claim: shared}\nsteps: {train: {gpus: 0, tolerations: []}}"])
def test_trainjob_fits_the_published_api_models(tmp_path, monkeypatch, settings):
    (tmp_path / "cluster.yaml").write_text(settings)
    monkeypatch.setenv("PIXELCLIP_PIPELINE_RUN", "0ab1")
    draft = template(read(tmp_path / "cluster.yaml"), 3, "r/p:1")
    body = complete(draft, Path("/workspace/a/masks"), Path("/workspace/a/train"), TrainConfig())
    # The models drop unknown fields, so an unchanged document has none.
    assert TrainerV1alpha1TrainJob.from_dict(body).to_dict() == body
    assert body["metadata"]["name"] == "pixelclip-0ab1"
    broken = json.loads(json.dumps(body))
    broken["spec"]["trainer"]["numNodez"] = 2
    assert TrainerV1alpha1TrainJob.from_dict(broken).to_dict() != broken


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("parts: 1", "volume.claim in cluster.yaml"),
        (
            "volume: {claim: a}\nsteps: {train: {timeout: 9d}}",
            "train_job.timeout 3d: must be at least steps.train.timeout (9d)",
        ),
    ],
)
def test_impossible_settings_for_several_nodes_are_rejected(tmp_path, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compiled(tmp_path, settings, nodes=2)
    assert not (tmp_path / "pipeline.yaml").exists()


# cluster.yaml.


def test_shipped_file_states_defaults_and_every_key():
    shipped, text = read(ROOT / "cluster.yaml"), (ROOT / "cluster.yaml").read_text()
    assert shipped.model_copy(update={"secrets": [], "config_maps": []}) == Cluster()
    document = yaml.safe_load(text)
    assert set(document) == set(Cluster.model_fields) and set(document["steps"]) == set(STEPS)
    assert all(name in text for name in (*Step.model_fields, *Source.model_fields))


def test_every_key_is_described():
    for kind in (Cluster, Step, Source):
        for name, field in kind.model_fields.items():
            assert len(field.description or "") > 8, name


def test_one_changed_setting_keeps_the_other_defaults():
    changed = Cluster.model_validate({"steps": {"train": {"gpus": 8}}}).steps["train"]
    assert changed == Cluster().steps["train"].model_copy(update={"gpus": 8})


def test_cluster_yaml_of_the_current_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read() == Cluster()
    Path("cluster.yaml").write_text("parts: 5")
    assert read().parts == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imag: a:1", "unknown key 'imag', did you mean 'image'?"),
        ("steps: {train: {gpu: 2}}", "steps.train: unknown key 'gpu', did you mean 'gpus'?"),
        ("steps: {tarin: {gpus: 2}}", "unknown step 'tarin', did you mean 'train'?"),
        ("steps: {train: {gpus: -1}}", "steps.train.gpus: Input should be greater than or equal to 0 (found -1)"),
        ("namespace: 007.0", "namespace: must be text; quote it: '...' (found 7.0)"),
        ("steps: {train: {node_selector: {pool: 1.10}}}", "pool: must be text; quote it: '...' (found 1.1)"),
        ("steps: {train: {timeout: 5}}", "steps.train.timeout: String should match pattern"),
        ("steps: {train: {backoff_factor: 1.5}}", "steps.train.backoff_factor: Input should be a valid integer"),
        ("steps: {train: {backoff_max: 1h}}", "steps.train: unknown key 'backoff_max', did you mean 'backoff"),
        ("steps: {train: {retries: 30}}", "retries 30, timeout 2d, backoff 1m and backoff_factor 2 come to 745716 days"),
        ("steps: {train: {memory: 128Gi}}", "memory 128Gi is more than memory_limit 96Gi"),
        ("steps: {train: {cpu_limit: 500m}}", "cpu 8 is more than cpu_limit 500m"),
        ("steps: {train: {tolerations: [{kex: a}]}}", "steps.train.tolerations.0: unknown key 'kex', did you mean 'key'?"),
        ("steps: {train: {tolerations: [{key: a, value: b}]}}", "Equal needs both"),
        ("steps: 3", "steps: Input should be a valid dictionary"),
        ("steps: {train: }", "steps.train: "),
        ("secrets: [{name: a, env: {X: y}, opt: 1}]", "secrets.0: unknown key 'opt', did you mean 'optional'?"),
        ("secrets: [{name: a, env: {}}]", "secrets.0.env: Dictionary should have at least 1 item"),
        (
            "secrets: [{name: a, env: {X: y}}, {name: b, env: {X: y}}]",
            "secrets and config_maps: environment variables defined twice: X",
        ),
        ("volume: {claim: my.claim}", "volume.claim: 'my.claim' must be a DNS label"),
        (f"volume: {{claim: {'a' * 64}}}", "at most 63 lower-case letters, digits and '-', no '-' at its ends (found 64"),
        ("volume: {claim: Shared}", "volume.claim: 'Shared' must be a DNS label"),
        ("volume: {claim: -a}", "volume.claim: '-a' must be a DNS label"),
        (
            "config_maps: [{name: a, env: {MLFLOW_TRACKING_URI: y}}]",
            "MLFLOW_TRACKING_URI is a variable of KFP's MLflow plugin, and Kubernetes rejects a pod in which both define it; "
            "the variable for MLflow's address is PIXELCLIP_MLFLOW_URI",
        ),
        ("volume: {clam: x}", "volume: unknown key 'clam', did you mean 'claim'?"),
        ("trainer: {runtim: x}", "trainer: unknown key 'runtim', did you mean 'runtime'?"),
        ("mlflow_ui: mlflow.example", "mlflow_ui: "),
        ("steps: {train: {retries: 1000000000}}", "steps.train.retries: Input should be less than or equal to 100"),
        ("steps: {train: {backoff_factor: 1000000000}}", "backoff_factor: Input should be less than or equal to 100"),
        (f"steps: {{train: {{timeout: {'9' * 5000}d}}}}", "steps.train: "),
        ("parts: 1000000000", "parts: Input should be less than or equal to 10000"),
        ("parts: 0", "parts: Input should be greater than or equal to 1"),
        ("- a", "must contain keys and values, found list"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_error_in_the_file_names_its_key(tmp_path, text, message):
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'cluster.yaml'))}: .*{re.escape(message)}"):
        read(tmp_path / "cluster.yaml")


def test_claim_of_63_characters_and_no_claim_are_accepted(tmp_path):
    for claim in ("", "a", "a1", "a" * 63, f"a-{'b' * 61}", "0-0"):
        assert Cluster.model_validate({"volume": {"claim": claim}}).volume.claim == claim


@pytest.mark.parametrize("kind", ["secrets", "config_maps"])
def test_variables_may_share_a_key(tmp_path, kind):
    settings = f"{kind}: [{{name: a, env: {{AWS_REGION: region, B: b, AWS_DEFAULT_REGION: region}}}}]"
    _, platform, _ = compiled(tmp_path, settings)
    for pod in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        sources = pod["secretAsEnv" if kind == "secrets" else "configMapAsEnv"]
        variables = {
            each["envVar"]: each.get("secretKey") or each.get("configMapKey")
            for source in sources
            for each in source["keyToEnv"]
        }
        assert variables == {"AWS_REGION": "region", "B": "b", "AWS_DEFAULT_REGION": "region"}


def test_shipped_settings_give_both_sdks_the_region():
    (source,) = [source for source in read(ROOT / "cluster.yaml").config_maps if "AWS_REGION" in source.env]
    assert source.env["AWS_REGION"] == source.env["AWS_DEFAULT_REGION"] == "AWS_DEFAULT_REGION"


def test_durations():
    assert [seconds(each) for each in ("90s", "20m", "4h", "2d")] == [90, 1200, 14400, 172800]
