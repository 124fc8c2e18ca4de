"""Count and report unusable samples; stop a stage when there are too many."""

import re
from dataclasses import dataclass, field

_NAMED = 10  # maximum number of bad samples listed by name
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Control characters, which a terminal would execute as commands."""


@dataclass
class BadSamples:
    """Unusable samples of one stage.

    Attributes:
        stage: name of the stage.
        max_fraction: maximum fraction of bad samples.
        found: name and reason of each bad sample, one line each.
    """

    stage: str
    max_fraction: float
    found: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Record one bad sample."""
        self.found.append(f"{name}: {reason}")

    def stop_if_too_many(self, total: int, found: int | None = None) -> str:
        """Return a summary; raise ValueError with it if more than `max_fraction` of `total` samples are bad.

        Args:
            total: number of samples, good and bad.
            found: number of bad samples, including those of other processes; `len(self.found)` by default.
        """
        found = len(self.found) if found is None else found
        lines = [f"  {CONTROL.sub(lambda found: ascii(found[0])[1:-1], line)}" for line in self.found[:_NAMED]]
        if rest := found - len(lines):  # not listed, or recorded by other processes or before a resume
            lines.append(f"  and {rest} more")
        named = "\n".join(lines).encode(errors="backslashreplace").decode()
        summary = f"{self.stage}: {found} of {total} samples cannot be used:\n{named}" if found else ""
        if found > self.max_fraction * total:
            raise ValueError(f"{summary}\nthe limit is {self.max_fraction:.1%} ({self.stage}.max_bad_share)")
        return summary

    def check(self, total: int, found: int | None = None) -> None:
        """Print the final summary; arguments and errors are those of `stop_if_too_many`."""
        if summary := self.stop_if_too_many(total, found):
            print(summary, flush=True)
