"""Cost of `propagation`, see `bench.refinement`."""

from bench import refinement
from bench.case import Case


def make() -> Case:
    """Create the comparison."""
    return refinement.make("propagation")
