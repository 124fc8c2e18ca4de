"""The house: a module imports only from modules above it; inference needs no training extras; no pickle."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from imports import MODULES, PACKAGE, imported, imported_with_theirs

TABLE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text().partition("| module | what it is |")[2]
ROWS = re.findall(r"^\| (`.*?`) \|", TABLE, re.MULTILINE)
ORDER = [*re.findall(r"`(\w+)`", " ".join(ROWS)), "__main__"]


def test_every_module_has_its_place():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_modules_above_it(module):
    above = set(ORDER[: ORDER.index(module)])
    assert imported(module) <= above


def test_inference_needs_no_training_extra():
    code = """
import sys
from pathlib import Path
for name in ("mlflow", "kfp", "dvc", "skimage", "pycocotools", "pandas"):
    sys.modules[name] = None
import pixelclip.predict, pixelclip.benchmarks, pixelclip.cli
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_imports_no_heavy_package():
    code = "import sys, pixelclip.cli; print(sorted({'torch', 'mlflow', 'kfp', 'open_clip'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_workers_of_the_loader_do_not_wait_for_torchvision():
    """Its import brings torch's compiler: more than all else that a worker imports."""
    code = "import sys, pixelclip.dataset; print(sorted({'torchvision', 'open_clip', 'sympy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_no_pickle_anywhere():
    for path in PACKAGE.glob("*.py"):
        source = path.read_text()
        assert "torch.save" not in source
        assert source.count("torch.load(") == source.count("weights_only=True") == (path.stem == "weights")
        assert "pickle.load" not in source
        assert "pickle.dump" not in source


def test_training_never_reads_labels():
    assert "benchmarks" not in imported_with_theirs("train")
