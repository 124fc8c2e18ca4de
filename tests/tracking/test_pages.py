"""MLflow's pages in headless Chromium, on a real server with two runs of this package."""

import os
import re

import pytest
from playwright.sync_api import expect

from helpers import browser as chromium
from helpers.mlflow_runs import PROVENANCE, mlflow_on_sqlite
from pixelclip.tracking.description import evaluation_metrics, run_name
from pixelclip.tracking.pages import for_training, run_page, version_page
from pixelclip.tracking.run import Run

SECONDS = 60
browser = chromium.browser
services = pytest.mark.services
SCORES = {300: (44.5, 14.75), 40: (31.25, 1.5)}
"""mIoU and gain of the runs by their steps."""


def provenance(steps: int) -> dict[str, object]:
    return PROVENANCE | {"settings": {"steps": steps, "clip": "toy"}, "fingerprint": f"{steps:06x}"}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Yield the server's address, its experiment's ID and the runs' IDs by steps; the client uses the server, too."""
    folder = tmp_path_factory.mktemp("pages")
    made = mlflow_on_sqlite(folder)
    made.server.start()
    try:
        made.server.wait()
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(("MLFLOW_", "PIXELCLIP_PIPELINE"))]:
                patch.delenv(name)
            patch.setenv("MLFLOW_TRACKING_URI", made.uri)
            runs = {steps: log(folder / str(steps), steps) for steps in SCORES}
            experiment = runs[40].client.get_run(runs[40].run_id).info.experiment_id
        yield made.uri, experiment, {steps: run.run_id for steps, run in runs.items()}
    finally:
        made.server.kill()


def log(folder, steps: int) -> Run:
    folder.mkdir()
    run = Run.start(folder, run_name(provenance(steps)), provenance(steps))
    for step in range(1, 4):
        run.log({"train/loss": 1 / step}, step)
    miou, gain = SCORES[steps]
    rows = [{"class": "sky|heaven", "iou": miou, "iou_clip": 20.0, "pixels": 5}]
    run.values(evaluation_metrics({"miou/set": miou, "gain/set": gain, "images/set": 4.0}, rows))
    run.note(f"# Model after {steps} steps\n\n| | mIoU |\n|---|---|\n| PixelCLIP | {miou} |")
    assert run.finish()
    return run


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(SECONDS * 1000)
    yield page
    page.close()


def shown(page, text: str):
    found = page.get_by_text(text).locator("visible=true").first
    expect(found).to_be_visible(timeout=SECONDS * 1000)
    return found


@services
def test_experiment_opens_as_model_training_with_both_runs(page, logged):
    server, experiment, _ = logged
    page.goto(for_training(f"{server}/#/experiments/{experiment}"))
    for steps in SCORES:
        shown(page, run_name(provenance(steps)))
    shown(page, "Model registry")
    assert page.get_by_text("Playground").count() == 0  # of GenAI


@services
def test_run_shows_its_description_and_metrics_in_groups(page, logged):
    server, experiment, runs = logged
    page.goto(run_page(server, runs[300], experiment))
    shown(page, "Model after 300 steps")
    shown(page, "eval/set/gain")
    shown(page, "14.75")
    shown(page, "Model registry")
    assert page.get_by_text("Playground").count() == 0
    page.get_by_role("tab", name="Model metrics").click()
    for group in ("train", "eval/set", "eval/set/iou"):
        expect(page.get_by_text(re.compile(rf"^{group}( \(\d+\))?$")).first).to_be_visible(timeout=SECONDS * 1000)


@services
def test_comparison_shows_the_metrics_side_by_side(page, logged):
    server, experiment, runs = logged
    chosen = ",".join(f'"{run_id}"' for run_id in runs.values())
    page.goto(for_training(f'{server}/#/compare-runs?runs=[{chosen}]&experiments=["{experiment}"]'))
    for steps, (miou, gain) in SCORES.items():
        shown(page, run_name(provenance(steps)))
        shown(page, str(miou))
        shown(page, str(gain))


def test_urls_open_as_model_training_once():
    url = for_training("http://m/#/experiments/1?a=b")
    assert url == for_training(url) == "http://m/#/experiments/1?a=b&workflowType=machine_learning"
    assert run_page("http://m", "r", "2") == "http://m/#/experiments/2/runs/r?workflowType=machine_learning"
    assert version_page("http://m", "n", 3) == "http://m/#/models/n/versions/3?workflowType=machine_learning"
    assert for_training("https://wandb.example/runs/1") == "https://wandb.example/runs/1"
