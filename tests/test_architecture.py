"""Architecture: a module imports only from modules above it; entry points import what they need; no pickle."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from imports import MODULES, PACKAGE, imported, imported_with_theirs

TABLE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text().partition("| module | what it is |")[2]
ROWS = re.findall(r"^\| (`.*?`) \|", TABLE, re.MULTILINE)
ORDER = [*re.findall(r"`(\w+)`", " ".join(ROWS)), "__main__"]


def test_every_module_is_listed():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", ORDER)
def test_module_imports_only_from_modules_above_it(module):
    above = set(ORDER[: ORDER.index(module)])
    assert imported(module) <= above


IMPORTS = """
import sys

def loaded(*names):
    return sorted(name for name in names if name in sys.modules)

import pixelclip.cli
print("help:", *loaded("torch", "mlflow", "kfp", "open_clip"))
import pixelclip.dataset
print("loader worker:", *loaded("torchvision", "open_clip", "sympy"))
for name in ("mlflow", "kfp", "dvc", "skimage", "pycocotools", "pandas"):
    sys.modules[name] = None
import pixelclip.predict, pixelclip.benchmarks
print("inference works")
"""


def test_each_entry_point_imports_no_more_than_it_needs():
    """One process for three checks, from the lightest to the heaviest, because an import of torch takes seconds.

    Help imports no heavy package. A worker of the loader does not import torchvision, which imports torch's compiler.
    Inference needs no package of the training extra.
    """
    done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["help:", "loader worker:", "inference works"]


def test_no_pickle_anywhere():
    for path in PACKAGE.glob("*.py"):
        source = path.read_text()
        assert "torch.save" not in source
        assert source.count("torch.load(") == source.count("weights_only=True") == (path.stem == "weights")
        assert "pickle.load" not in source
        assert "pickle.dump" not in source


def test_training_never_reads_labels():
    assert "benchmarks" not in imported_with_theirs("train")
