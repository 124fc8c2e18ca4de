"""`evaluate` with pixelclip in bfloat16: `pixelclip evaluate ... precision=bfloat16`."""

from benchmarks import evaluate
from benchmarks.case import Case


def make() -> Case:
    """Make the comparison."""
    return evaluate.make(precision="bfloat16")
