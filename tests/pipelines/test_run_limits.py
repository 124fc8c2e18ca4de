"""Time limit, deletion and own volume of a run, in the part of the compiled pipelines that KFP reads."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kfp import compiler
from kfp.components import load_component_from_file

from helpers import kfp_server
from helpers.command_line import pixelclip  # noqa: F401
from pixelclip_components.fetch_model.component import fetch_model
from pixelclip_pipelines import pixelclip as pixelclip_pipeline
from pixelclip_pipelines import predict, sweep, sweep_run
from pixelclip_pipelines.cluster_config import Cluster, read
from pixelclip_pipelines.cluster_tasks import run_config

kfp, run = kfp_server.kfp, kfp_server.run
DATA = ("--images", "/data/images", "--labelled", "/data/toy")
LIMITS = {"deadline": "36h", "ttl_success": "2d", "ttl_failure": "90m"}
VOLUME = {"size": "200Gi", "storage_class": "nfs"}
BUILDERS = {"pixelclip": pixelclip_pipeline.build, "predict": predict.build, "sweep": sweep.build, "sweep_run": sweep_run.build}


def config_of(path: Path) -> dict | None:
    """Return what KFP's API server reads of a compiled pipeline about the whole run."""
    platform = list(yaml.safe_load_all(path.read_text()))[1]
    return platform["platforms"]["kubernetes"].get("pipelineConfig")


def compiled(folder: Path, name: str, **settings) -> Path:
    path = folder / f"{name}.yaml"
    compiler.Compiler().compile(BUILDERS[name](Cluster.model_validate(settings)), str(path))
    return path


@pytest.mark.parametrize("name", BUILDERS)
def test_every_pipeline_has_limits_and_volume(tmp_path, name):
    path = compiled(tmp_path, name, run=LIMITS, volume=VOLUME)
    assert config_of(path) == {
        "activeDeadlineSeconds": 36 * 3600,
        "resourceTtlOnSuccess": 2 * 24 * 3600,
        "resourceTtlOnFailure": 90 * 60,
        "workspace": {
            "size": "200Gi",
            "kubernetes": {"pvcSpecPatch": {"accessModes": ["ReadWriteMany"], "storageClassName": "nfs"}},
        },
    }
    assert load_component_from_file(str(path)).component_spec.name.startswith("pixelclip")


@pytest.mark.parametrize("name", BUILDERS)
def test_without_these_settings_kfp_keeps_its_defaults(tmp_path, name):
    assert config_of(compiled(tmp_path, name)) is None and run_config(None) is None


def test_steps_that_read_the_workspace_get_the_volume_of_the_run(tmp_path):
    """KFP mounts the volume in every step that has a parameter with its path, which is the default of `workspace`."""
    spec = next(yaml.safe_load_all(compiled(tmp_path, "pixelclip", volume=VOLUME).read_text()))
    assert spec["root"]["inputDefinitions"]["parameters"]["workspace"]["defaultValue"] == "/kfp-workspace"
    inner = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    for name, task in inner.items():
        passed = task["inputs"]["parameters"]["workspace"]
        assert passed == {"componentInputParameter": "pipelinechannel--workspace"}, name
    assert inner["pin-revision"]["inputs"]["parameters"]["volume"] == {"runtimeValue": {"constant": "/kfp-workspace"}}


def test_a_run_without_a_workspace_gets_its_own_volume(kfp, run):
    Path("cluster.yaml").write_text("volume: {size: 10Gi}")
    assert run("submit", *DATA)[0] == 0 and run("submit", *DATA, "--workspace", "/kfp-workspace/mine")[0] == 0
    given = [created["runtime_config"]["parameters"]["workspace"] for created in kfp.all("runs")]
    assert given == ["/kfp-workspace", "/kfp-workspace/mine"]
    code, _, err = run("submit", *DATA, "--workspace", "/workspace/a")
    assert (
        code == 2
        and "must be a folder on the volume that steps share (volume in cluster.yaml: mounted at /kfp-workspace)" in err
    )


def test_a_claim_is_used_only_by_runs_that_name_a_workspace(kfp, run):
    Path("cluster.yaml").write_text("volume: {claim: shared}")
    assert run("submit", *DATA)[0] == 0
    assert kfp.all("runs")[0]["runtime_config"]["parameters"]["workspace"] == ""


def test_several_nodes_need_a_claim(kfp, run):
    Path("cluster.yaml").write_text("volume: {size: 10Gi}")
    code, _, err = run("submit", *DATA, "--nodes", "2")
    assert code == 2 and "volume.claim in cluster.yaml, not size" in err and kfp.asked == []


def test_a_prediction_is_not_lost_with_the_volume_of_its_run(kfp, run):
    """KFP deletes the volume after success, so the result must be elsewhere."""
    Path("cluster.yaml").write_text("volume: {size: 10Gi}")
    words = ("submit-predict", "--images", "s3://data/a", "--classes", "dog,sky")
    for workspace in ((), ("--workspace", "/kfp-workspace/a")):
        code, _, err = run(*words, *workspace)
        assert code == 2 and "out must be an s3:// prefix" in err and "deletes" in err and kfp.asked == []
    assert run(*words, "--out", "s3://data/labels")[0] == 0
    given = kfp.all("runs")[0]["runtime_config"]["parameters"]
    assert (given["workspace"], given["out"]) == ("/kfp-workspace", "s3://data/labels")


def test_first_step_of_a_prediction_refuses_the_same_from_kfps_form(tmp_path):
    artifact = SimpleNamespace(path=str(tmp_path / "model"), metadata={})
    with pytest.raises(ValueError, match="out must be an s3:// prefix"):
        fetch_model.python_func("m", "dog,sky", artifact, workspace="/kfp-workspace", volume="/kfp-workspace")
    assert not (tmp_path / "model").exists()


def test_models_of_a_sweep_are_not_lost_with_the_volume_of_its_run(tmp_path):
    """Only the pipeline itself registers its model; a sweep's models stay in KFP's store unless a workspace is named."""
    spec = next(yaml.safe_load_all(compiled(tmp_path, "sweep", volume=VOLUME).read_text()))
    assert "/kfp-workspace" not in str(spec)
    assert "/kfp-workspace" not in str(next(yaml.safe_load_all(compiled(tmp_path, "sweep_run", volume=VOLUME).read_text())))
    file, cluster, out = tmp_path / "rows.yaml", tmp_path / "cluster.yaml", tmp_path / "compiled.yaml"
    file.write_text("seeds: [0]\nrows: {short: {train.steps: 2}}\n")
    cluster.write_text("volume: {size: 10Gi}")
    sweep.compile_to(file, out, cluster=cluster, image="r/p:1")
    document = next(yaml.safe_load_all(out.read_text()))
    runs = document["root"]["inputDefinitions"]["parameters"]["runs"]["defaultValue"]
    assert [each["workspace"] for each in runs] == [""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {deadline: 0s}", "run.deadline: "),
        ("run: {deadline: 24856d}", "run.deadline: 24856d is longer than 24855d"),
        ("run: {ttl: 1d}", "run: unknown key 'ttl'; the keys are deadline, ttl_success, ttl_failure"),
        ("volume: {claim: a, size: 1Gi}", "volume: claim 'a' and size '1Gi': give only one of them"),
        ("volume: {storage_class: a}", "volume: storage_class 'a' without size"),
        ("volume: {size: much}", "volume.size: "),
        ("volume: {size: 1Gi, access_mode: ReadOnlyMany}", "volume.access_mode: "),
    ],
)
def test_error_names_the_setting(tmp_path, text, message):
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path / "cluster.yaml")
