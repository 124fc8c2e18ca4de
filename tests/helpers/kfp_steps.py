"""Run components as KFP's launcher does: `kfp.dsl.executor_main` with `_KFP_RUNTIME=true` and a recorded input.

`run` starts one process for all, because importing torch takes seconds. In it the long stages (STAGES) are replaced by
functions that check how they are called; everything before and after them is the component's own.

The inputs are those of 0.1.0 on KFP 2.17.0. Where a parameter or an output of a component has been renamed since, the files
have its new name; paths in a store that the test does not have are folders below /workspace.
"""

import inspect
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from kfp.local.subprocess_task_handler import SubprocessTaskHandler

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests" / "fixtures" / "kfp" / "executor_input"
STAGES = ("shards", "masks", "train", "evaluate_clip", "evaluate", "register")


def source(name: str) -> str:
    """Return the program of a component, as in the compiled pipeline."""
    component = getattr(import_module(f"pixelclip_components.{name}.component"), name)
    return str(component.component_spec.implementation.container.command[-1])


def accept_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kfp's local runner run the steps of a cluster, whose executor is started by the supervisor."""
    monkeypatch.setattr(SubprocessTaskHandler, "validate_not_container_component", lambda self, full_command: None)


def run(folder: Path, inputs: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Run the component of every input in `RECORDED`.

    Args:
        folder: receives what KFP keeps at /minio, /workspace and /tmp/kfp.
        inputs: name of a recorded input (`train-parts`) to the component's name.
        environment: variables of the process besides this one's.

    Returns:
        For each input `error` (empty if the step succeeded), `output` (the executor's file), and `called`, the arguments of
        the stage.
    """
    jobs = {}
    for name, component in inputs.items():
        text = (RECORDED / f"{name}.json").read_text()
        for path in ("/minio", "/workspace", "/tmp/kfp"):
            for quote in ('"', r"\""):
                text = text.replace(f"{quote}{path}", f"{quote}{folder}{path}")
        jobs[name] = {"component": component, "source": source(component), "input": text}
    process = subprocess.run(
        [sys.executable, "-m", "helpers.kfp_steps", str(folder)],
        input=json.dumps(jobs),
        env=os.environ | environment | {"_KFP_RUNTIME": "true", "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return dict(json.loads((folder / "results.json").read_text()))


def _main(folder: Path) -> None:
    from kfp.dsl import executor_main
    from kfp.dsl.types import artifact_types

    artifact_types._MINIO_LOCAL_MOUNT_PREFIX = f"{folder}/minio/"
    results = {}
    for name, job in json.load(sys.stdin).items():
        called: dict[str, str] = {}
        if job["component"] in STAGES:
            _replace(job["component"], called)
        module = folder / f"{name.replace('-', '_')}_step.py"
        module.write_text(job["source"])
        sys.argv = ["executor_main", "--component_module_path", str(module), "--executor_input", job["input"]]
        sys.argv += ["--function_to_execute", job["component"]]
        error = ""
        try:
            executor_main.executor_main()
        except BaseException:
            error = traceback.format_exc()
        file = Path(json.loads(job["input"])["outputs"]["outputFile"])
        output = json.loads(file.read_text()) if file.is_file() else {}
        results[name] = {"error": error, "output": output, "called": called}
    (folder / "results.json").write_text(json.dumps(results))


def _replace(stage: str, called: dict[str, str]) -> None:
    module = import_module(f"pixelclip.{stage}")
    signature = inspect.signature(getattr(module.run, "__wrapped__", module.run))

    def run(*given: Any) -> dict[str, float]:
        arguments = signature.bind(*given).arguments
        called.update({name: str(value) for name, value in arguments.items()})
        out = arguments["out"]
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text("<p>")
        registration = {
            "name": "m",
            "version": 1,
            "role": "champion",
            "reason": "better",
            "run_id": "r",
            "model_uri": "models:/m/1",
        }
        (out / "registration.json").write_text(json.dumps(registration | {"tracking_uri": "sqlite:///mlflow.db"}))
        provenance = {"stage": stage, "settings": {}, "inputs": {}, "version": "0.1.0", "revision": "abc"}
        provenance["output"] = {"md5": "m" * 32, "num_files": 1, "size": 1}
        (out / "provenance.json").write_text(json.dumps(provenance))
        return {f"{stage}/value": 0.5}

    run.__wrapped__ = getattr(module.run, "__wrapped__", module.run)  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
