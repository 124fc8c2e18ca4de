"""The rules of CONTRIBUTING.md: imports between packages, size of modules and functions; light imports, no pickle."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from helpers.imports import MODULES, PACKAGE, imported, imported_with_theirs

PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
TABLE = PAGE.partition("| package | content |")[2]
ROWS = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`.*?`) \|", TABLE, re.MULTILINE)]
LAYER = {name: number for number, row in enumerate(ROWS) for name in row}
STAGES = next(row for row in ROWS if "train" in row)
ENTRY_POINTS = {"api", "commands", "cli", "__main__"}
LONGER_MODULES = {"config": 450, "cli.app": 450}  # one line per setting, one function per command
LONGER_FUNCTIONS = {("train", "_train")}


def top(module):
    return module.partition(".")[0]


def test_every_package_has_one_row():
    assert sorted(name for row in ROWS for name in row) == sorted({top(module) for module in MODULES} - {"__main__"})


def test_packages_have_a_row_of_their_own():
    packages = {top(module) for module in MODULES if (PACKAGE / top(module)).is_dir()}
    assert all(len(row) == 1 for row in ROWS if packages & set(row))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_packages_above(module):
    if module == "__main__":
        return
    below = {name for name in imported(module) if top(name) != top(module) and LAYER[top(name)] >= LAYER[top(module)]}
    assert not below


@pytest.mark.parametrize("module", MODULES)
def test_stages_are_imported_by_entry_points_only(module):
    if top(module) not in ENTRY_POINTS:
        assert not {name for name in imported(module) if name in STAGES}


def test_no_import_cycle():
    inside = {module: {name for name in imported(module) if not module.startswith(f"{name}.")} for module in MODULES}
    list(TopologicalSorter(inside).static_order())  # raises CycleError


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_stay_short(module):
    source = MODULES[module].read_text()
    assert len(source.splitlines()) <= LONGER_MODULES.get(module, 350)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (module, node.name) not in LONGER_FUNCTIONS:
            assert node.end_lineno - node.lineno < 70, node.name


IMPORTS = """
import sys

def loaded(*names):
    return sorted(name for name in names if name in sys.modules)

import pixelclip, pixelclip.cli.app
print("help:", *loaded("torch", "mlflow", "kfp", "open_clip"))
import pixelclip.data.dataset
print("loader worker:", *loaded("torchvision", "open_clip", "sympy"))
for name in ("mlflow", "kfp", "dvc", "skimage", "pycocotools", "pandas"):
    sys.modules[name] = None
import pixelclip.inference.predictor, pixelclip.data.labelled_sets
print("inference works")
"""


def test_each_entry_point_imports_no_more_than_it_needs():
    """Make three checks in one process, from the lightest to the heaviest, because importing torch takes seconds.

    Help imports no heavy package. A loader worker does not import torchvision, which imports torch's compiler. Inference
    needs no package of the training extra.
    """
    done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["help:", "loader worker:", "inference works"]


def test_no_pickle_anywhere():
    for module, path in MODULES.items():
        source = path.read_text()
        assert "torch.save" not in source
        assert source.count("torch.load(") == source.count("weights_only=True") == (module == "models.weights")
        assert "pickle.load" not in source
        assert "pickle.dump" not in source


def test_training_reads_labels_only_to_evaluate():
    for module in imported("train") - {"evaluation.during_training"}:
        assert "data.labelled_sets" not in imported_with_theirs(module), module
