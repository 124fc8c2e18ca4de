"""The promotion gate: compare a challenger's metrics with the champion's."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GateMetrics:
    """Metrics that the gate compares: mIoU and gain over CLIP in points; `measured_on` identifies labelled set and protocol."""

    miou: float
    gain: float
    measured_on: str


@dataclass(frozen=True)
class Decision:
    """Whether a model becomes champion, and why."""

    champion: bool
    reason: str


def decide(challenger: GateMetrics, champion: GateMetrics | None, min_gain: float) -> Decision:
    """Decide whether a challenger becomes champion: enough gain over CLIP, and a higher mIoU than the champion's.

    Raises:
        ValueError: a metric is not finite.
    """
    for metrics in filter(None, (challenger, champion)):
        if not (math.isfinite(metrics.miou) and math.isfinite(metrics.gain)):
            raise ValueError(f"the gate needs finite metrics, found mIoU {metrics.miou} and gain {metrics.gain}")
    if challenger.gain < min_gain:
        return Decision(False, f"gain {challenger.gain:.2f} over CLIP is below register.min_gain {min_gain:g}")
    if champion is None:
        return Decision(True, f"gain {challenger.gain:.2f} over CLIP, and there was no champion")
    if champion.measured_on != challenger.measured_on:
        return Decision(
            False,
            "the champion was evaluated on a different labelled set or protocol, or with another first resize; evaluate both "
            "alike. The champion's resize is in its tag `resize`; without that tag it is evaluate.shortest_edge=0",
        )
    comparison = f"mIoU {challenger.miou:.2f} against the champion's {champion.miou:.2f}"
    return Decision(challenger.miou > champion.miou, comparison)
