"""Search on a cluster: the Experiment against Kubeflow's SDK and its models, Katib's rules, a real trial, the command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubeflow.optimizer import KubernetesBackendConfig, Objective, OptimizerClient, RandomSearch, Search, TrialConfig
from kubeflow.trainer import CustomTrainer, TrainJobTemplate
from kubeflow_katib_api.models import V1beta1Experiment
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubernetes import client as kubernetes_client

from helpers import tiny
from helpers.command_line import pixelclip  # noqa: F401
from helpers.katib_server import fake_katib
from helpers.sweeps import sweep_data, write_sweep
from pixelclip.commands import sweep_file
from pixelclip.tracking.server import connect
from pixelclip_pipelines import trial
from pixelclip_pipelines.cluster_config import Cluster, read
from pixelclip_pipelines.cluster_sections import seconds
from pixelclip_pipelines.optimization import manifest

RATE, CONCEPTS, KIND = "train.learning_rate_decoder", "train.concepts", "train.concept_kind"
RANGES = {RATE: {"log": ["1e-4", "1e-2"]}, CONCEPTS: {"linear": [4, 8]}, KIND: {"choice": ["prompts", "vectors"]}}
PLACES = ("s3://bucket/masks", "/workspace/labelled", "/workspace/search")
SUBMIT = ("pipeline", "submit-sweep", "search.yaml", "--masks", PLACES[0], "--labelled", PLACES[1], "--workspace", PLACES[2])
METRIC = re.compile(r"([\w|-]+)\s*=\s*([+-]?\d*(\.\d+)?([Ee][+-]?\d+)?)")  # Katib's default filter of a log


@pytest.fixture
def katib(tmp_path, monkeypatch):
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(kubernetes_client.Configuration, "_default", None)
    monkeypatch.delenv("PIXELCLIP_IMAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text("volume: {claim: shared}\nparallel: 3\nimage: r/p:1\nsecrets: [{name: s3, env: {K: k}}]")
    write_sweep(Path("search.yaml"), name="Rates & kinds!", ranges=RANGES, trials=12, seeds=[5, 6], settings={"train.steps": 9})
    with fake_katib(tmp_path / "kubeconfig") as server:
        yield server


def experiment(places=PLACES, **changed) -> dict:
    name, plan = sweep_file.read(Path("search.yaml"))
    return manifest(name, plan, *places, read(Path("cluster.yaml")), **changed)


def test_models_of_the_sdk_accept_every_field(katib):
    made = experiment()
    assert V1beta1Experiment.from_dict(made).to_dict() == made, "the models ignore fields that they do not know"
    job = made["spec"]["trialTemplate"]["trialSpec"]
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    assert re.fullmatch(r"pixelclip-rates-kinds-[0-9a-f]{8}", made["metadata"]["name"])


def test_experiment_is_the_one_that_optimizer_client_creates(katib):
    """All but the trial's job, into which OptimizerClient could put neither the volume nor the Secrets of the cluster."""
    client = OptimizerClient(KubernetesBackendConfig(namespace="kubeflow"))
    name = client.optimize(
        TrainJobTemplate(CustomTrainer(func=tiny.clip_folder, num_nodes=1), runtime="torch-distributed"),
        trial_config=TrialConfig(num_trials=12, parallel_trials=3),
        search_space={RATE: Search.loguniform(1e-4, 1e-2), KIND: Search.choice(["prompts", "vectors"])},
        objectives=[Objective("gain", "maximize")],
        algorithm=RandomSearch(random_state=5),
    )
    theirs, ours = katib.experiments[name], experiment()
    assert (ours["apiVersion"], ours["kind"]) == (theirs["apiVersion"], theirs["kind"])
    int_range = {"name": CONCEPTS, "parameterType": "int", "feasibleSpace": {"min": "4", "max": "8", "distribution": "uniform"}}
    assert ours["spec"]["parameters"].pop(1) == int_range, "the SDK's Search has no whole numbers"
    for key in ("parameters", "objective", "algorithm", "maxTrialCount", "parallelTrialCount"):
        assert ours["spec"][key] == theirs["spec"][key]
    template, other = ours["spec"]["trialTemplate"], theirs["spec"]["trialTemplate"]
    assert {key: template[key] for key in ("retain", "primaryContainerName")} == {
        key: other[key] for key in ("retain", "primaryContainerName")
    }
    assert [each for each in template["trialParameters"] if each["name"] in (RATE, KIND)] == other["trialParameters"]
    assert template["trialSpec"]["kind"] == other["trialSpec"]["kind"]
    assert set(template) == set(other)


def test_optimizer_client_reads_it(katib, pixelclip):  # noqa: F811
    assert pixelclip(*SUBMIT)[0] == 0
    (name,) = katib.experiments
    job = OptimizerClient(KubernetesBackendConfig(namespace="kubeflow")).get_job(name)
    assert (job.trial_config.num_trials, job.trial_config.parallel_trials) == (12, 3)
    assert (job.objectives[0].metric, job.objectives[0].direction.value) == ("gain", "maximize")
    assert job.algorithm == RandomSearch(random_state=5)
    assert (job.search_space[RATE].min, job.search_space[RATE].max) == (1e-4, 1e-2)
    assert job.search_space[KIND].choices == ["prompts", "vectors"]


def substituted(made: dict, values: dict[str, str]) -> dict:
    """Return the trial's job as Katib does: replace the text of the template, and check its rules."""
    template = made["spec"]["trialTemplate"]
    text = json.dumps(template["trialSpec"])
    names = {each["name"] for each in made["spec"]["parameters"]}
    for each in template["trialParameters"]:
        assert each["reference"] in names or each["reference"] == "${trialSpec.Name}"
        assert f"${{trialParameters.{each['name']}}}" in text
        text = text.replace(f"${{trialParameters.{each['name']}}}", values[each["name"]])
    assert "${trialParameters." not in text
    job = json.loads(text)
    assert not {"name", "namespace"} & job["metadata"].keys(), "Katib names it"
    return job


def as_katib_runs_it(job: dict) -> list[str]:
    """Return the words that the shell of Katib's wrapped container passes to the trial."""
    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["sh", "-c"]
    printing = f"{sys.executable} -c 'import sys, json; print(json.dumps(sys.argv[1:]))'"
    script = " ".join([*trainer["args"], "2>&1"]).replace("python3 -m pixelclip_pipelines.trial", printing, 1)
    return json.loads(subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout)


def test_trial_has_the_settings_and_the_pod_of_the_cluster(katib):
    values = {RATE: "0.0042", CONCEPTS: "6", KIND: "vectors", "trial": "pixelclip-x-abc123"}
    job = substituted(experiment(), values)
    words = as_katib_runs_it(job)
    assert words[:5] == [
        "--masks=s3://bucket/masks",
        "--labelled=/workspace/labelled",
        "--out=/workspace/search/pixelclip-x-abc123",
        "--sweep=Rates & kinds!",
        "--seeds=5,6",
    ]
    assert set(words[5:]) == {f"{CONCEPTS}=6", f"{KIND}=vectors", f"{RATE}=0.0042", "train.steps=9"}
    trainer = job["spec"]["trainer"]
    assert (trainer["image"], trainer["numNodes"]) == ("r/p:1", 1)
    assert {"name": "K", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "k", "optional": False}}} in trainer["env"]
    assert job["spec"]["activeDeadlineSeconds"] == 2 * seconds(Cluster().steps["train"].timeout)


def test_trial_trains_evaluates_and_prints_the_gain(tmp_path, monkeypatch, capsys):
    masks, labelled, params = sweep_data(tmp_path)
    sections = yaml.safe_load(params.read_text())
    fixed = [f"{stage}.{name}={value}" for stage, values in sections.items() for name, value in values.items()]
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    words = [f"--masks={masks}", f"--labelled={labelled}", f"--out={tmp_path}/t-1", "--sweep=s", "--seeds=0,3", *fixed]
    monkeypatch.setattr(sys, "argv", ["trial", *words, "train.steps=1", f"{CONCEPTS}=4"])
    trial.main()
    out = capsys.readouterr().out
    gains = [
        json.loads((tmp_path / f"t-1/seed-{seed}/evaluation/metrics.json").read_text())["gain/labelled"] for seed in (0, 3)
    ]
    found = [(name, value) for name, value, *_ in METRIC.findall(out) if name == "gain"]
    assert len(found) == 1 and float(found[0][1]) == pytest.approx(sum(gains) / 2, abs=1e-6)
    runs = connect().search_runs(["1"])
    assert {(run.info.run_name, run.data.tags["sweep.row"], run.data.tags["sweep.name"]) for run in runs} == {
        ("t-1, seed 0", "t-1", "s"),
        ("t-1, seed 3", "t-1", "s"),
    }
    trial.main()
    assert "train: reused" in capsys.readouterr().out, "a repeated trial continues"
    monkeypatch.setattr(sys, "argv", ["trial", *words, f"{CONCEPTS}=1"])
    with pytest.raises(SystemExit, match="trial: settings: train: concepts: Input should be greater than or equal to 2"):
        trial.main()


def test_command_creates_it_once_and_shows_its_state(katib, pixelclip):  # noqa: F811
    code, out, err = pixelclip(*SUBMIT)
    (name,) = katib.experiments
    assert (code, out, err) == (0, f"Experiment {name} is created; the same command shows its state\n", "")
    assert katib.experiments[name]["spec"] == experiment()["spec"]
    assert pixelclip(*SUBMIT)[1] == f"Experiment {name}: Created\n"
    katib.experiments[name]["status"] = {  # as Katib writes it
        "conditions": [{"type": "Created", "status": "True"}, {"type": "Running", "status": "True"}],
        "trials": 5,
        "trialsSucceeded": 3,
        "trialsRunning": 2,
        "currentOptimalTrial": {
            "bestTrialName": f"{name}-x7",
            "parameterAssignments": [{"name": RATE, "value": "0.004"}, {"name": CONCEPTS, "value": "6"}],
            "observation": {"metrics": [{"name": "gain", "latest": "5.25", "min": "5.25", "max": "5.25"}]},
        },
    }
    assert V1beta1Experiment.from_dict(katib.experiments[name]).status.trials_succeeded == 3
    expected = f"Experiment {name}: Running, 3 trials succeeded, 2 running\n"
    assert pixelclip(*SUBMIT)[1] == f"{expected}best: {name}-x7, gain 5.25: {RATE}=0.004 {CONCEPTS}=6\n"
    assert len(katib.experiments) == 1
    assert pixelclip(*SUBMIT[:-1], "/workspace/other")[0] == 0 and len(katib.experiments) == 2


def test_compiled_experiment_is_the_submitted_one(katib, pixelclip):  # noqa: F811
    words = ("pipeline", "compile-sweep", *SUBMIT[2:], "--out", "experiment.yaml")
    assert pixelclip(*words) == (0, "experiment.yaml\n", "")
    assert yaml.safe_load(Path("experiment.yaml").read_text()) == experiment() and katib.asked == []


@pytest.mark.parametrize(
    ("cluster", "words", "message"),
    [
        ("{}", SUBMIT, "volume in cluster.yaml: none"),
        ("volume: {size: 1Gi}", (*SUBMIT[:-1], "/kfp-workspace/a"), "volume.claim in cluster.yaml"),
        ("volume: {claim: c}", SUBMIT[:-2], "--workspace is missing"),
        ("volume: {claim: c}", (*SUBMIT[:4], "https://x.y/z?key=1", *SUBMIT[5:]), "--masks https://x.y/z contains credentials"),
    ],
)
def test_errors_are_reported_before_anything_is_sent(katib, pixelclip, cluster, words, message):  # noqa: F811
    Path("cluster.yaml").write_text(cluster)
    code, out, err = pixelclip(*words)
    assert code == 2 and message in err and out == "" and katib.asked == []


def test_choices_that_a_shell_would_change_are_rejected(katib):
    write_sweep(Path("search.yaml"), ranges={"train.clip": {"choice": ["toy", "it's"]}}, trials=2)
    with pytest.raises(ValueError, match="numbers and texts without quotes"):
        experiment()


def test_errors_of_kubernetes_are_one_line(katib, pixelclip, tmp_path):  # noqa: F811
    katib.refuse = 403
    code, _, err = pixelclip(*SUBMIT)
    assert code == 2 and "Kubernetes rejected the Experiment (403): experiments.kubeflow.org is forbidden" in err
    (tmp_path / "kubeconfig").write_text((tmp_path / "kubeconfig").read_text().replace(katib.url, "http://127.0.0.1:9"))
    code, _, err = pixelclip(*SUBMIT)
    assert code == 2 and "Kubernetes at http://127.0.0.1:9 cannot be reached" in err and err.count("\n") == 1
    (tmp_path / "kubeconfig").unlink()
    code, _, err = pixelclip(*SUBMIT)
    assert code == 2 and "no kubeconfig: set KUBECONFIG" in err
