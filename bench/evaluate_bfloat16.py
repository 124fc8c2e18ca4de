"""`evaluate` with pixelclip in bfloat16 (`precision=bfloat16`)."""

from bench import evaluate
from bench.case import Case


def make() -> Case:
    """Create the comparison."""
    return evaluate.make(precision="bfloat16")
