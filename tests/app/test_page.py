"""The page in headless Chromium: `pixelclip app` as its users start it."""

import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

from helpers import browser as chromium
from helpers import tiny
from helpers.processes import wait_until
from pixelclip.models.clip_sources import clip_folder
from pixelclip.storage.files import digest, write_json

pytestmark = pytest.mark.services
SECONDS = 120
browser = chromium.browser


def icon() -> bytes:
    """Return an ICO; Pillow decodes the image in it when it is opened, whatever size it states."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "ICO")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Start the page for a model that began as the toy CLIP."""
    folder = tmp_path_factory.mktemp("app")
    model = tiny.model_folder(folder / "model", clip_folder("toy"))
    config = json.loads((model / "config.json").read_text())
    write_json(model / "config.json", config | {"clip": {"spec": "toy", "md5": config["clip"]["md5"]}})
    provenance = json.loads((model / "provenance.json").read_text())
    files = [model / "model.safetensors", model / "config.json"]
    write_json(model / "provenance.json", provenance | {"output": digest(model, files)})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tiny.model_folder(folder / "other" / "model", tiny.clip_folder(folder / "clip"))
    models = ["--model", str(model), "--model", str(folder / "other" / "model")]
    command = [sys.executable, "-m", "pixelclip", "app", *models, "--port", str(port), "--device", "cpu"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        wait_until(lambda: "Ctrl-C" in (folder / "log").read_text() or server.poll() is not None, SECONDS)
        assert server.poll() is None, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}"
        server.terminate()
        assert server.wait(30) == 143


@pytest.fixture
def page(browser, url):
    page, outside = browser.new_page(), []
    page.set_default_timeout(SECONDS * 1000)
    page.on("request", lambda request: outside.append(request.url))
    page.goto(url)
    page.wait_for_selector("#photo")
    yield page
    page.close()
    assert all(each.startswith((url, "data:", "blob:")) for each in outside), outside


def segment(page: Page, photo: Path, classes: str) -> None:
    page.locator("#photo input[type=file]").set_input_files(photo)
    page.wait_for_selector("#photo img")
    page.locator("#classes textarea, #classes input").fill(classes)
    page.get_by_role("button", name="Segment").click()


def saved(path: Path, size=(60, 40)) -> Path:
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_example_photo_is_segmented_with_one_click(page):
    page.locator("table tbody tr").first.click()
    page.wait_for_selector("#legend table")
    assert "road" in page.locator("#legend").inner_text()
    assert page.locator("#result img").count() >= 2
    assert "knows these words" in page.content()


def test_photo_classes_heat_map_and_the_label_map_to_download(page, tmp_path):
    segment(page, saved(tmp_path / "photo.png"), "sky, dog|puppy")
    page.wait_for_selector("#legend table")
    first = page.locator("#result img").first.get_attribute("src")
    page.locator("#shown input").click()
    page.get_by_role("option", name="sky").click()
    page.wait_for_function("before => document.querySelector('#result img').src !== before", arg=first)
    with page.expect_download() as download:
        page.locator("#download").click()
    labels = opened(download.value.path())
    assert labels.shape == (40, 60) and labels.max() <= 1
    shares = [f"{100 * (labels == index).mean():.1f} %" for index in (0, 1)]
    assert all(share in page.locator("#legend").inner_text() for share in shares)


@pytest.mark.parametrize(
    ("name", "content", "classes", "message"),
    [
        ("notes.png", b"no image", "sky", "notes.png"),
        ("icon.png", icon(), "sky", "cannot identify image file"),
        ("photo.png", None, "", "at least one name is needed"),
        ("photo.png", None, "sky, sky", "must differ"),
        ("photo.png", None, ", ".join(f"name {number}" for number in range(1001)), "at most 1000"),
    ],
)
def test_bad_input_is_one_sentence_on_the_page(page, tmp_path, name, content, classes, message):
    photo = saved(tmp_path / name)
    if content is not None:
        photo.write_bytes(content)
    page.locator("#photo input[type=file]").set_input_files(photo)
    page.wait_for_selector("#photo img")
    page.locator("#classes textarea, #classes input").fill(classes)
    page.get_by_role("button", name="Segment").click()
    page.wait_for_selector(f"text={message}")
    assert "Traceback" not in page.content()


def test_ten_visitors_at_once_each_get_their_own_result_and_one_who_leaves_disturbs_nobody(browser, url, tmp_path):
    contexts = [browser.new_context() for _ in range(10)]
    pages = [context.new_page() for context in contexts]
    for number, page in enumerate(pages):
        page.set_default_timeout(SECONDS * 1000)
        page.goto(url)
        page.wait_for_selector("#photo")
        segment(page, saved(tmp_path / f"{number}.png", (40 + number, 40)), f"sky, word {number}")
    pages[0].close()
    for number, page in enumerate(pages[1:], start=1):
        page.wait_for_selector("#legend table")
        assert f"word {number}" in page.locator("#legend").inner_text()
        with page.expect_download() as download:
            page.locator("#download").click()
        assert opened(download.value.path()).shape == (40, 40 + number)
    for context in contexts:
        context.close()


def test_both_models_and_their_clips_can_be_chosen(page):
    page.get_by_label("Right").click()
    page.wait_for_selector("[role=option]")
    offered = page.get_by_role("option").all_inner_texts()
    assert len(offered) == 4 and sum("CLIP (" in name for name in offered) == 2


def test_page_is_usable_on_a_phone(browser, url):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(url)
    page.wait_for_selector("#photo")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
