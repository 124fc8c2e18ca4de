"""torch's compiler is not imported for inference, and works when it is."""

import subprocess
import sys

from helpers import tiny

SCRIPT = """
import sys
from pathlib import Path
from PIL import Image
from pixelclip.inference.predictor import Predictor

Predictor.load(Path(sys.argv[1]), "cpu")(Image.new("RGB", (60, 40)), ["dog", "sky"])
print("torch._dynamo" in sys.modules, "sympy" in sys.modules)

import torch
from timm.models.naflexvit import NaFlexRopeIterator  # timm excludes its __next__ from compilation
from torchvision.ops import roi_align

print(roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]), 1).item())
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
print("torch._dynamo" in sys.modules, NaFlexRopeIterator.__next__.__name__)
"""


def test_inference_works_without_torchs_compiler_and_the_compiler_afterwards(tmp_path):
    model = tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"))
    done = subprocess.run([sys.executable, "-c", SCRIPT, model], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["False False", "1.0", "2.0", "True __next__"], done.stderr[-2000:]
