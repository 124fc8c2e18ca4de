"""Every component in a running step of KFP, with the inputs that a real KFP gave its executor."""

import json
import math
from pathlib import Path

import pytest

from helpers import kfp_steps, tiny
from helpers.trainjob_server import ends, fake_kubernetes, kubeconfig
from pixelclip.tracking.run import PIPELINE_RUN

INPUTS = {path.stem: path.stem.partition("-")[0] for path in sorted(kfp_steps.RECORDED.glob("*.json"))}
COMPONENTS = {path.parent.name for path in (kfp_steps.ROOT / "components").glob("*/component.py")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("step")


@pytest.fixture(scope="module")
def results(folder):
    trained = folder / "workspace" / "w1" / "train"
    trained.mkdir(parents=True)
    (trained / "metrics.json").write_text('{"train/loss": 0.25}')
    recorded = json.loads((kfp_steps.RECORDED / "evaluate.json").read_text())["inputs"]["artifacts"]
    model = folder / recorded["model"]["artifacts"][0]["uri"].replace("minio://", "minio/")
    model.mkdir(parents=True)
    (model / "metrics.json").write_text('{"train/loss": 0.25}')
    (folder / "workspace" / "photos").mkdir()
    (folder / "workspace" / "photos" / "a.jpg").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch, fake_kubernetes() as kubernetes:
        tiny.mlflow_at(patch, folder / "mlflow")
        kubernetes.fate = [ends("Complete")]
        environment = {PIPELINE_RUN: "run-1", "KUBECONFIG": str(kubeconfig(folder / "kubeconfig", kubernetes.url))}
        return kfp_steps.run(folder, INPUTS, environment)


def test_inputs_of_every_component_were_recorded():
    newer = {"fetch_model", "predict", "merge"}  # than the recordings; test_predict.py runs them with kfp's local runner
    assert set(INPUTS.values()) == COMPONENTS - newer


@pytest.mark.parametrize("name", INPUTS)
def test_component_runs_as_kfp_starts_it(results, name):
    """KFP sets _KFP_RUNTIME=true, which removes most of kfp.dsl and all of kfp.kubernetes."""
    result = results[name]
    assert result["error"] == ""
    recorded = json.loads((kfp_steps.RECORDED / f"{name}.json").read_text())["outputs"]
    declared = set(recorded["artifacts"]) - {"executor-logs"}
    artifacts = result["output"].get("artifacts", {})
    assert set(artifacts) >= declared
    assert set(result["output"].get("parameterValues", {})) == set(recorded.get("parameters", {}))
    metadata = [each["artifacts"][0]["metadata"] for each in artifacts.values()]
    for value in (value for each in metadata for value in each.values()):  # ML Metadata rejects both
        assert value is not None and not (isinstance(value, float) and math.isnan(value))


def test_stages_get_inputs_and_settings(results, folder):
    store = f"{folder}/minio/mlpipeline/v2/artifacts/pixelclip"
    assert results["shards"]["called"]["images"] == "s3://pixelclip/small/images"
    assert results["masks"]["called"]["shards"].startswith(f"{store}/") and "part='2/3'" in results["masks"]["called"]["config"]
    assert results["train"]["called"]["masks"].startswith(f"{store}/")
    assert "steps=45" in results["train"]["called"]["config"] and "side=96" in results["train"]["called"]["config"]
    assert Path(results["train-parts"]["called"]["masks"]).name.startswith("parts-"), "links to three parts"
    assert results["evaluate"]["called"]["clip_evaluation"].endswith("/evaluation")
    assert "name='pixelclip-toy'" in results["register"]["called"]["config"]
    models = {
        name: results[name]["output"]["artifacts"]["model"]["artifacts"][0]["metadata"] for name in ("train", "train_job")
    }
    assert models["train"]["train/value"] == 0.5 and models["train_job"]["train/loss"] == 0.25
