"""Promotion and rollback of the champion, an alias of a registered model.

MLflow's aliases have no compare-and-set. A promotion therefore moves the alias, waits, reads it again and, if another process
has moved it, decides again against the new champion. docs/registry.md states the remaining race.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pixelclip.config import RegisterConfig
from pixelclip.registry.gate import Decision, GateMetrics, decide
from pixelclip.settings import nearest
from pixelclip.tracking.server import connect, is_missing, public_uri, reason_of

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
UNMEASURED = "unmeasured"
"""Role of a version without an evaluation. It has no alias, and only `promote --force` makes it champion."""
GATE = "gate"
"""Tag of a version: its role and the reason."""
_ATTEMPTS = 10
_SETTLE_SECONDS = 0.5


def run(name: str, version: int, force: str = "") -> Decision:
    """Promote a registered version to champion if it passes the gate; the former champion becomes `previous`.

    Args:
        name: registered model.
        version: its version.
        force: reason for promoting against the gate, which is recorded; an empty reason obeys the gate.

    Returns:
        The decision; if negative, the champion stays.

    Raises:
        ValueError: the model or version is unknown, a metric is missing or not finite, or MLflow is unreachable.
    """
    with registry(name) as client:
        decision = pass_gate(client, name, str(version), force=force)
    print(f"promote: {name} version {version} is {'champion' if decision.champion else 'not promoted'}: {decision.reason}")
    return decision


def rollback(name: str) -> str:
    """Swap `champion` and `previous` of a registered model and return the new champion's version.

    Raises:
        ValueError: the model is unknown or has no `previous`, another process moved the champion, or MLflow is unreachable.
    """
    with registry(name) as client:
        start = time.monotonic()
        aliases = _aliases(client, name)
        champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        if previous is None or previous == champion:
            listed = ", ".join(f"{alias} {version}" for alias, version in aliases.items()) or "none"
            raise ValueError(f"{name}: no previous champion to roll back to (aliases: {listed})")
        _set_alias(client, name, CHAMPION, previous)
        if champion:
            _set_alias(client, name, PREVIOUS, champion)
        if (found := _settled(client, name, start).get(CHAMPION)) != previous:
            raise ValueError(f"{name}: another process has just made version {found} the champion; check it and try again")
        if champion:
            client.set_model_version_tag(name, champion, GATE, f"previous: rolled back to version {previous}")
        client.set_model_version_tag(name, previous, GATE, f"champion: rolled back from version {champion}")
    print(f"promote: {name}: rolled back from version {champion} to version {previous}")
    return previous


def pass_gate(client: MlflowClient, name: str, version: str, *, force: str = "", challenge: bool = False) -> Decision:
    """Decide on a version and move the aliases.

    Args:
        client: a connected client.
        name: registered model.
        version: its version, with the metrics in its tags.
        force: see `run`.
        challenge: make a rejected version `challenger`.

    Raises:
        ValueError: a metric is missing or not finite (nothing was changed), or other processes keep moving the alias.
    """
    for _ in range(_ATTEMPTS):
        start = time.monotonic()
        aliases = _aliases(client, name)
        champion = aliases.get(CHAMPION)
        if champion == version:
            return Decision(True, "it is the champion already")
        decision = _judge(client, name, version, champion, force)
        if not decision.champion:
            break
        if champion:  # before the champion, so that a kill in between leaves it unchanged
            _set_alias(client, name, PREVIOUS, champion)
        _set_alias(client, name, CHAMPION, version)
        aliases = _settled(client, name, start)
        if aliases.get(CHAMPION) == version:
            break
    else:
        raise ValueError(f"{name}: other processes keep moving the alias {CHAMPION!r}; try again")
    if decision.champion and aliases.get(CHALLENGER) == version:
        client.delete_registered_model_alias(name, CHALLENGER)
    if challenge and not decision.champion:
        _set_alias(client, name, CHALLENGER, version)
    if challenge or decision.champion:
        role = CHAMPION if decision.champion else CHALLENGER
        client.set_model_version_tag(name, version, GATE, f"{role}: {decision.reason}")
    return decision


def write_metrics(client: MlflowClient, name: str, version: str, tags: Mapping[str, str]) -> None:
    """Write the metrics of an evaluation, including `measured_on`, to the tags of a version."""
    # Tags are written one at a time. Without `measured_on`, `metrics_of` rejects the rest, so that old and new do not mix.
    client.delete_model_version_tag(name, version, "measured_on")
    for key, value in sorted(tags.items(), key=lambda tag: tag[0] == "measured_on"):
        client.set_model_version_tag(name, version, key, value)


def metrics_of(version: ModelVersion) -> GateMetrics:
    """Read the metrics in the tags of a registered version.

    Raises:
        ValueError: a metric is missing or not a finite number.
    """
    where = f"{version.name} version {version.version}"
    missing = [tag for tag in ("miou", "gain", "measured_on") if not version.tags.get(tag)]
    if missing:
        raise ValueError(f"{where}: has no tag {', '.join(missing)}; `pixelclip register` with its evaluation writes them")
    values = []
    for tag in ("miou", "gain"):
        try:
            values.append(float(version.tags[tag]))
        except ValueError:
            values.append(math.nan)
        if not math.isfinite(values[-1]):
            raise ValueError(f"{where}: tag {tag} must be a finite number, found {version.tags[tag]!r}")
    return GateMetrics(values[0], values[1], version.tags["measured_on"])


@contextmanager
def registry(name: str) -> Iterator[MlflowClient]:
    """Yield a connected client; turn MLflow's exceptions about a registered model into one-line ValueErrors."""
    client = connect()
    try:
        yield client
    except MlflowException as error:
        if is_missing(error) and "Registered Model" in error.message:
            existing = [model.name for model in client.search_registered_models()]
            known = f"; registered are {', '.join(existing)}" if existing else "; no models are registered"
            hint = nearest(name, existing) or known
            raise ValueError(f"{name}: no such registered model at {public_uri()}{hint}") from None
        raise ValueError(f"{name}: rejected by MLflow at {public_uri()}: {reason_of(error)}") from None


def _judge(client: MlflowClient, name: str, version: str, champion: str | None, force: str) -> Decision:
    challenger = client.get_model_version(name, version)
    min_gain = float(challenger.tags.get("min_gain", RegisterConfig().min_gain))
    try:
        against = metrics_of(client.get_model_version(name, champion)) if champion else None
        decision = decide(metrics_of(challenger), against, min_gain)
    except ValueError as error:
        if not force:
            raise
        decision = Decision(False, str(error))
    if decision.champion or not force:
        return decision
    client.set_model_version_tag(name, version, "forced", force)
    return Decision(True, f"forced, {force}; the gate rejected it: {decision.reason}")


def _set_alias(client: MlflowClient, name: str, alias: str, version: str) -> None:
    try:
        client.set_registered_model_alias(name, alias, version)
    except MlflowException:  # unique-key conflict: another process just created the alias, so retry as an update
        client.set_registered_model_alias(name, alias, version)


def _settled(client: MlflowClient, name: str, start: float) -> dict[str, str]:
    """Read the aliases again, after giving concurrent promotions time to move the alias."""
    time.sleep(max(_SETTLE_SECONDS, 2 * (time.monotonic() - start)))
    return _aliases(client, name)


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
