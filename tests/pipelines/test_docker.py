"""Pipeline steps and the served model in containers of a real Docker engine."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import docker
import numpy as np
import pytest
from kfp import dsl, local
from mlflow import MlflowClient

from helpers import services, tiny
from helpers.mlflow_runs import mlflow_on_sqlite
from helpers.registrations import evaluation
from helpers.serving import ask, decoded, photo
from pixelclip.config import SETTINGS, RegisterConfig, ToyConfig
from pixelclip.inference.prediction import overlay
from pixelclip.inference.predictor import Predictor
from pixelclip.register import run as register
from pixelclip.toy import run as paint
from pixelclip_components import IMAGE
from pixelclip_pipelines.docker_runner import containers
from pixelclip_pipelines.run import run_locally

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]  # KFP's warnings
ROOT = Path(__file__).parents[2]
OURS = {"pixelclip.test": str(uuid.uuid4())}  # other pipelines may run on this machine
LABEL = {"label": [f"{name}={value}" for name, value in OURS.items()]}
DEATHS = {
    "exit code 1": "exit 1",
    "exit code 137": "echo working; exit 137",
    "docker kill": "echo working; sleep 300",
    "docker rm": "echo working; sleep 300",
}


@pytest.fixture(scope="module")
def engine():
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture
def run(tmp_path, capsys):
    """Run a pipeline in containers; return whether it succeeded and what it printed."""

    def run(pipeline, arguments=None, options=None):
        with containers(arguments or {}, tmp_path) as runner:
            runner.container_run_args |= options or {}
            runner.container_run_args["labels"] |= OURS
            local.init(runner, pipeline_root=str(tmp_path / "kfp"), raise_on_error=True)
            try:
                pipeline(**(arguments or {}))
                done = True
            except RuntimeError:
                done = False
        return done, capsys.readouterr().out

    return run


@dsl.container_component
def shell(script: str):
    return dsl.ContainerSpec(image=IMAGE, command=["sh", "-c", script])


@dsl.pipeline(name="one-step")
def one_step(script: str):
    shell(script=script)


def _end_from_outside(engine, how):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for container in engine.containers.list(filters=LABEL):
            if b"working" in container.logs():
                container.kill() if how == "docker kill" else container.remove(force=True)
                return
        time.sleep(0.02)


def test_40_forced_failures_are_40_failures(engine, run):
    reported = {how: [] for how in DEATHS}
    for _ in range(10):
        for how, script in DEATHS.items():
            outside = threading.Thread(target=_end_from_outside, args=(engine, how))
            if how.startswith("docker"):
                outside.start()
            reported[how].append(run(one_step, {"script": script})[0])
            if how.startswith("docker"):
                outside.join()
    assert reported == {how: [False] * 10 for how in DEATHS}
    assert engine.containers.list(all=True, filters=LABEL) == []


def test_20_successes_are_20_successes(run):
    assert [run(one_step, {"script": "exit 0"})[0] for _ in range(20)] == [True] * 20


def test_out_of_memory_fails_the_step_with_a_reason(run):
    hungry = "python3 -c 'x = bytearray(500_000_000)'"
    done, printed = run(one_step, {"script": hungry}, {"mem_limit": "100m", "memswap_limit": "100m"})
    assert not done
    assert "out of memory" in printed


def test_unknown_command_fails_the_step(run):
    @dsl.container_component
    def nothing():
        return dsl.ContainerSpec(image=IMAGE, command=["no-such-program"])

    @dsl.pipeline(name="no-program")
    def no_program():
        nothing()

    done, printed = run(no_program)
    assert not done
    assert "no-such-program" in printed


def test_output_is_shown_line_by_line(run):
    done, printed = run(one_step, {"script": r"printf 'caf\303'; sleep 0.3; printf '\251\n10%%\r20%%\rend'"})
    assert done
    assert [line.strip() for line in printed.splitlines() if line.startswith("    ")][:4] == ["café", "10%", "20%", "end"]


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def number(value: int, out: dsl.Output[dsl.Dataset], metrics: dsl.Output[dsl.Metrics], fault: str = "") -> int:
    import os
    from pathlib import Path

    if fault == "ends early":
        os._exit(0)
    metrics.log_metric("value", value)
    if fault != "writes nothing":
        Path(out.path).write_text(str(value))
    return value + 1


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def product(first: dsl.Input[dsl.Dataset], second: int, out: dsl.Output[dsl.Dataset]):
    from pathlib import Path

    Path(out.path).write_text(str(int(Path(first.path).read_text()) * second))


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def total(parts: dsl.Input[list[dsl.Dataset]], out: dsl.Output[dsl.Dataset]) -> int:
    from pathlib import Path

    result = sum(int(Path(part.path).read_text()) for part in parts)
    Path(out.path).write_text(str(result))
    return result


@dsl.pipeline(name="sums")
def sums(value: int, fault: str = ""):
    counted = number(value=value, fault=fault)
    with dsl.ParallelFor([1, 2, 3]) as factor:
        parts = product(first=counted.outputs["out"], second=factor)
    total(parts=dsl.Collected(parts.outputs["out"]))


def test_artifacts_pass_between_containers_and_through_a_loop(run, tmp_path):
    done, printed = run(sums, {"value": 7})
    assert done
    assert "Output: 42" in printed
    [written] = (tmp_path / "kfp").glob("*/total/out")
    assert written.read_text() == "42"
    assert {path.stat().st_uid for path in tmp_path.rglob("*")} == {os.getuid()}


@pytest.mark.parametrize(("fault", "missing"), [("ends early", "Output, out, metrics"), ("writes nothing", "out")])
def test_missing_declared_outputs_fail_the_step(run, fault, missing):
    done, printed = run(sums, {"value": 7, "fault": fault})
    assert not done
    names = re.search("declared outputs are missing: (.*)", printed)[1]
    assert set(names.split(", ")) == set(missing.split(", "))
    assert "product" not in printed.split("declared outputs")[0]


@dsl.pipeline(name="side-by-side")
def side_by_side(script: str):
    with dsl.ParallelFor([1, 2, 3, 4]):
        shell(script=script)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_and_starts_no_container(engine, tmp_path, number):
    script = f"""
from pipelines.test_docker import Path, containers, local, side_by_side
with containers({{}}, Path({str(tmp_path)!r})) as runner:
    runner.container_run_args["labels"] |= {OURS}
    local.init(runner, pipeline_root={str(tmp_path / "kfp")!r})
    side_by_side(script="echo working; sleep 300")
"""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT / "tests", stderr=subprocess.DEVNULL)
    while len(engine.containers.list(filters=LABEL)) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) != 0
    assert engine.containers.list(all=True, filters=LABEL) == []


def test_pipeline_runs_in_containers(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow/mlflow.db")
    monkeypatch.setenv("PIXELCLIP_REVISION", "of the caller, not of the image")
    paint(tmp_path / "toy", ToyConfig(train_scenes=24, test_scenes=4, side=128))
    settings = {"steps": 2, "train.picture_every": 0, "train.device": "cpu"}
    run_locally(Path("toy/images"), Path("toy/toy"), Path("out"), ROOT / "params.yaml", settings, runner="docker")
    revision = engine.images.get(IMAGE).labels["org.opencontainers.image.revision"]
    for stage in ("shards", "masks", "train", "evaluate_clip", "evaluate", "register"):
        assert json.loads((tmp_path / "out" / stage / "provenance.json").read_text())["revision"] == revision
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    registered = json.loads((tmp_path / "out" / "register" / "registration.json").read_text())
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    logged = client.get_run(registered["run_id"])
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics["eval/toy/miou"] == pytest.approx(metrics["miou/toy"])
    assert client.get_model_version(registered["name"], str(registered["version"])).run_id == registered["run_id"]
    assert (tmp_path / "out" / "report.html").is_file()


def _in_image(engine, code, **options):
    return engine.containers.run(IMAGE, ["-c", code], entrypoint="python", remove=True, network_mode="none", **options).decode()


def test_image_runs_without_root_on_a_read_only_root(engine):
    code = "import os, matplotlib.pyplot, mlflow, pixelclip.train; print(os.getuid(), os.getgid(), os.access('/work', os.W_OK))"
    assert _in_image(engine, code).split() == ["1000", "1000", "True"]
    assert _in_image(engine, code, user="4242:0", read_only=True, tmpfs={"/tmp": ""}).split() == ["4242", "0", "False"]


STAGES_IN_ORDER = {
    "toy": "toy.train_scenes=12 toy.test_scenes=2 toy.side=64",
    "fetch_data": "--repo /work/repository path=images",
    "shards": "--images fetch_data",
    "masks": "--shards shards workers=2",
    "train": "--masks masks clip=toy steps=2 batch_size=4 side=72 crop=64 shortest_edge=64 picture_every=1 workers=2",
    "evaluate_clip": "--labelled toy/toy --clip toy --side 72",
    "evaluate": "--model train --labelled toy/toy best=true",
    "register": "--model train --evaluation evaluate name=locked min_gain=-100",
}
"""Arguments of every stage, from an empty folder; a stage writes to the folder of its name."""


def test_every_stage_runs_on_a_read_only_root_without_rights_as_a_foreign_user(engine, tmp_path):
    assert set(STAGES_IN_ORDER) == set(SETTINGS)
    work, user = tmp_path / "work", 54321
    work.mkdir()

    def run(words):
        container = engine.containers.run(
            IMAGE,
            shlex.split(words),
            detach=True,
            user=f"{user}:{user}",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            network_mode="none",
            tmpfs={"/tmp": "mode=1777"},
            volumes={str(work): {"bind": "/work", "mode": "rw"}},
            environment={"MLFLOW_TRACKING_URI": "sqlite:////work/mlflow.db"},
            labels=OURS,
        )
        try:
            status = container.wait()["StatusCode"]
            assert status == 0, container.logs().decode()
        finally:
            container.remove(force=True)

    for stage, arguments in STAGES_IN_ORDER.items():
        if stage == "fetch_data":
            _git_repository(work / "repository", work / "toy" / "images")
        for path in (work, *work.rglob("*")):
            os.chown(path, user, user)
        run(f"{stage} {arguments} --out {stage}")
        assert (work / stage / "provenance.json").stat().st_uid == user
    assert json.loads((work / "register" / "registration.json").read_text())["role"] == "champion"
    run("predict fetch_data --classes sky,grass --model models:/locked@champion --out predictions")
    assert len(list((work / "predictions").rglob("*.png"))) >= 12


def _git_repository(folder, images):
    shutil.copytree(images, folder / "images")
    for words in ("init --quiet", "add .", "-c user.name=n -c user.email=e commit --quiet -m images"):
        subprocess.run(["git", *words.split()], cwd=folder, check=True)


def test_image_has_pinned_versions_and_no_development_packages(engine):
    code = "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
    installed = {(re.sub("[_.]", "-", name), version) for name, version in json.loads(_in_image(engine, code)).items()}
    # A package has several lines if its version depends on Python's.
    pins = re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", (ROOT / "requirements.txt").read_text(), flags=re.M)
    unpinned = installed - {(name.replace(".", "-"), version) for name, version in pins}
    assert {name for name, _ in unpinned} <= {"pixelclip", "pip", "setuptools"}  # the environment itself has the last two
    assert not {"pytest", "moto", "mypy", "ruff", "hypothesis", "pre-commit"} & {name for name, _ in installed}


def test_image_has_no_index_and_no_secret(engine):
    image = engine.images.get(IMAGE)
    description = json.dumps([image.attrs["Config"], image.history()])
    assert "INDEX_URL" not in description
    assert not re.search("password|secret|token|access_key", description, flags=re.I)
    assert set(image.labels) >= {"org.opencontainers.image.revision", "org.opencontainers.image.version"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder."""
    folder = tmp_path_factory.mktemp("model")
    return tiny.model_folder(folder / "model", tiny.clip_folder(folder / "clip"), change=0.01)


@pytest.fixture(scope="module")
def served(engine, model, tmp_path_factory):
    """Start the container by the command of docs/serving.md; yield it and its address."""
    folder = tmp_path_factory.mktemp("served")
    tracking = mlflow_on_sqlite(folder / "mlflow")
    manual = (ROOT / "docs" / "serving.md").read_text()
    (port,) = services.free_ports(1)
    command = re.search(r"^docker run (?:.*\\\n)*.*", manual, flags=re.M)[0].replace("\\\n", "")
    words = shlex.split(command.replace("pixelclip:latest", IMAGE).replace("5107", str(port)))
    limits = [f"--env=PIXELCLIP_SERVE_MAX_{limit}" for limit in ("PIXELS=2000", "CLASSES=4")]
    words[2:2] = [f"--label={LABEL['label'][0]}", *limits]
    address, environment = f"http://127.0.0.1:{port}", os.environ | {"MLFLOW_TRACKING_URI": tracking.uri}
    server = services.Server("the container", words, folder / "log", lambda: services.get(f"{address}/ping"), environment)
    with pytest.MonkeyPatch.context() as patch, services.running(tracking.server):
        tracking.server.wait()
        patch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
        measured = evaluation(folder / "evaluation", model, miou=40.0, gain=10.0)
        register(model, measured, folder / "out", RegisterConfig(name="pixelclip-toy", min_gain=1.0))
        with services.running(server):
            server.wait()
            (container,) = engine.containers.list(filters=LABEL)
            yield container, address
        assert engine.containers.list(filters=LABEL) == []  # removed when stopped


def test_served_container_predicts_unseen_classes(served, model):
    image, names = photo(50, 30, 0), ["zeppelin, airship", "meadow", "cottage"]
    status, answer = ask(f"{served[1]}/invocations", [(image, "zeppelin|airship,meadow,cottage")], overlay=True)
    assert status == 200
    (row,) = answer["predictions"]
    assert row["classes"] == names
    expected = Predictor.load(model, "cpu")(decoded(image), names)
    assert np.array_equal(np.asarray(decoded(row["label_map"])), expected.labels)
    assert row["scores"] == pytest.approx([one.max() for one in expected.scores], abs=1e-5)
    shown = np.asarray(overlay(decoded(image), expected))
    assert np.array_equal(np.asarray(decoded(row["overlay"])), shown)


@pytest.mark.parametrize(
    ("side", "classes", "message"),
    [
        (50, "a,b", "Error: row 0: image: 50 x 50 pixels; at most 2000 are allowed"),
        (40, "a,b,c,d,e", "Error: row 0: classes: 5 names; at most 4 are allowed"),
    ],
)
def test_served_container_enforces_limits(served, side, classes, message):
    status, answer = ask(f"{served[1]}/invocations", [(photo(side, side, 0), classes)])
    assert (status, answer["message"].splitlines()[-1]) == (400, message)


def test_served_container_is_healthy_and_has_no_rights(served):
    container, address = served
    assert services.get(f"{address}/ping")
    output = container.exec_run(["cat", "/proc/1/status"]).output.decode()
    for line in ("Uid:\t1000\t1000\t1000\t1000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"):
        assert line in output
    for folder in ("/", "/work", "/opt/pixelclip"):
        refused = container.exec_run(["touch", f"{folder}/file"])
        assert refused.exit_code == 1 and b"Read-only file system" in refused.output


def test_missing_engine_or_image_is_rejected_before_any_step(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    out = tmp_path / "out"
    monkeypatch.setattr("pixelclip_pipelines.docker_runner.IMAGE", "no-such-image:1")
    with pytest.raises(ValueError, match=r"no-such-image:1 .*`make image`"):
        run_locally(ROOT, ROOT, out, None, {}, runner="docker")
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    with pytest.raises(ValueError, match="no Docker engine answers"):
        run_locally(ROOT, ROOT, out, None, {}, runner="docker")
    assert not out.exists()
