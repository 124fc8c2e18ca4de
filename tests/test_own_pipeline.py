"""The example that uses our components in somebody else's pipeline."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kfp import local
from kfp.components import load_component_from_file
from PIL import Image
from skimage.segmentation import felzenszwalb

from pixelclip_components import IMAGE

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "own_pipeline.py"
PIPELINE = runpy.run_path(str(EXAMPLE))["own_pipeline"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        pixels = random.integers(0, 256, (3, 2 + number, 3), np.uint8).repeat(40, axis=0).repeat(40, axis=1)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=95)
    return folder


@pytest.fixture
def counts(photos):
    """Number of masks of each photo, from scikit-image alone."""
    images = [np.asarray(Image.open(path)) for path in sorted(photos.glob("*.jpg"))]
    return [len(np.unique(felzenszwalb(image, scale=300, sigma=0.8, min_size=100))) for image in images]


@pytest.mark.filterwarnings("ignore:.*custom or non-Python base image:RuntimeWarning")
def test_components_run_in_a_pipeline_of_ones_own(tmp_path, photos, counts, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"), raise_on_error=True)
    assert len(set(counts)) > 1
    assert PIPELINE(photos=str(photos), fewest=min(counts)).output == pytest.approx(np.mean(counts))


@pytest.mark.filterwarnings("ignore:.*custom or non-Python base image:RuntimeWarning")
def test_failing_own_step_fails_the_pipeline(tmp_path, photos, counts, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"), raise_on_error=True)
    with pytest.raises(RuntimeError, match="check-masks"):
        PIPELINE(photos=str(photos), fewest=max(counts) + 1)
    assert f"3 of 3 photos have fewer than {max(counts) + 1} masks" in capfd.readouterr().out


@pytest.mark.docker
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # KFP's warnings
def test_components_run_in_containers(tmp_path, photos, counts):
    from pixelclip_pipelines.docker_runner import containers

    with containers({"photos": str(photos)}, tmp_path) as runner:
        local.init(runner, pipeline_root=str(tmp_path / "kfp"), raise_on_error=True)
        assert PIPELINE(photos=str(photos)).output == pytest.approx(np.mean(counts))


def test_example_compiles_for_a_cluster(tmp_path):
    path = tmp_path / "deep" / "own.yaml"
    subprocess.run([sys.executable, str(EXAMPLE), "--compile", str(path)], check=True, cwd=tmp_path)
    spec = load_component_from_file(str(path)).component_spec
    assert set(spec.inputs) == {"photos", "scale", "fewest"}
    assert path.read_text().count(f"image: {IMAGE}\n") == 4
