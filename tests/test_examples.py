"""The notebook of `examples/` runs from its first cell to its last, as after `make demo`."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import registrations, tiny
from pixelclip import register
from pixelclip.api import toy
from pixelclip.config import RegisterConfig
from pixelclip.models.clip_sources import clip_folder

ROOT = Path(__file__).parents[1]


@pytest.mark.services
def test_notebook_runs_to_its_last_cell(tmp_path, monkeypatch):
    tiny.mlflow_at(monkeypatch, tmp_path / "runs")
    demo = tmp_path / "runs" / "demo"
    toy(demo / "toy", train_scenes=2000, test_scenes=29, side=32)
    model = tiny.model_folder(demo / "train", clip_folder("toy"), change=0.01)
    evaluation = registrations.evaluation(demo / "evaluate", model, 50.0, 10.0)
    register.run(model, evaluation, demo / "register", RegisterConfig(name="pixelclip-toy"))
    folder = tmp_path / "examples"
    folder.mkdir()
    notebook = nbformat.read(shutil.copy(ROOT / "examples" / "quickstart.ipynb", folder), as_version=4)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "runs/demo/toy/toy/images/002003.jpg:" in outputs[-1]["text"]
