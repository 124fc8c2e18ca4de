"""Which items of a store go: policies by age, number and total size."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

GRACE = 3600.0
"""Seconds after its last change during which an item counts as in use."""
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@dataclass(frozen=True)
class Item:
    """Something that is deleted as a whole.

    Args:
        name: its path, or its name in the store.
        size: bytes.
        changed: time of its last change, in seconds since the epoch.
        delete: deletes it; after an interruption another call completes the deletion.
        kept: why it stays under every policy; if empty, the policies decide.
        resumable: whether the same command would continue it. Only its age counts then.
        leftover: whether an interrupted deletion left it.
    """

    name: str
    size: int
    changed: float
    delete: Callable[[], None]
    kept: str = ""
    resumable: bool = False
    leftover: bool = False


class Verdict(NamedTuple):
    """An item, whether it goes, and why."""

    item: Item
    goes: bool
    reason: str


@dataclass(frozen=True)
class Policy:
    """Limits of a store, each as the user wrote it; None or an empty text is no limit.

    The newest `keep` items stay. Of the others go those older than `older_than` and, the oldest first, as many as exceed
    `max_size`; all, if neither is given.

    Raises:
        ValueError: no limit, or an invalid one.
    """

    older_than: str = ""
    keep: int | None = None
    max_size: str = ""

    def __post_init__(self) -> None:
        if not self.older_than and self.keep is None and not self.max_size:
            raise ValueError("gc needs a policy: --older-than, --keep or --max-size")
        _ = self.age, self.size

    @property
    def age(self) -> float | None:
        """`older_than` in seconds."""
        return _number("--older-than", self.older_than, _SECONDS, "30d, 12h or 4w") if self.older_than else None

    @property
    def size(self) -> float | None:
        """`max_size` in bytes."""
        return _number("--max-size", self.max_size, _BYTES, "50GB, 500MB or 1.5TB") if self.max_size else None


def _number(option: str, text: str, units: dict[str, int], examples: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text.strip())
    unit = next((unit for unit in units if match and unit.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise ValueError(f"{option} {text!r}: must be a number and one of {', '.join(units)}, for example {examples}")
    return float(match[1]) * units[unit]


def decide(items: Sequence[Item], policy: Policy, now: float) -> list[Verdict]:
    """Apply a policy to the items of one store.

    Args:
        items: all items; those that must stay count for `keep` and `max_size`, too.
        policy: the limits.
        now: current time, in seconds since the epoch.

    Returns:
        One verdict per item, the newest first.
    """
    ordered = sorted(items, key=lambda item: item.changed, reverse=True)
    newest = [item for item in ordered if not item.leftover][: policy.keep or 0]
    verdicts = [_verdict(item, policy, now, item in newest) for item in ordered]
    if policy.size is None:
        return verdicts
    total = sum(verdict.item.size for verdict in verdicts if not verdict.goes)
    for number in reversed(range(len(verdicts))):
        item, goes, reason = verdicts[number]
        if total > policy.size and not goes and not reason:
            total -= item.size
            verdicts[number] = Verdict(item, True, f"beyond {policy.max_size}")
    return [verdict._replace(reason=verdict.reason or f"within {policy.max_size}") for verdict in verdicts]


def _verdict(item: Item, policy: Policy, now: float, is_new: bool) -> Verdict:
    """Return the verdict without `max_size`, which decides if the reason is empty."""
    age = policy.age
    if item.leftover:
        return Verdict(item, True, "left by an interrupted deletion")
    if item.kept:
        return Verdict(item, False, item.kept)
    if now - item.changed < GRACE:
        return Verdict(item, False, "changed within the last hour")
    if is_new:
        return Verdict(item, False, f"among the newest {policy.keep}")
    if age is not None and now - item.changed > age:
        return Verdict(item, True, f"older than {policy.older_than}")
    if item.resumable:
        return Verdict(item, False, f"unfinished, not older than {policy.older_than}" if age else "unfinished: only age counts")
    if policy.size is not None:
        return Verdict(item, False, "")
    if age is not None:
        return Verdict(item, False, f"not older than {policy.older_than}")
    return Verdict(item, True, f"not among the newest {policy.keep}")
