"""`evaluate` with pixelclip in bfloat16: `pixelclip evaluate ... precision=bfloat16`."""

from bench import evaluate
from bench.case import Case


def make() -> Case:
    """Make the comparison."""
    return evaluate.make(precision="bfloat16")
