"""The champion of a registered model: the gate in front of it, promotion, rollback, and one promotion at a time.

MLflow's aliases know no compare-and-set, so promotions take turns by Lamport's bakery algorithm, which needs no more than
single tags that are written and read whole: a promotion draws a number (a tag of the registered model) and waits for every
smaller one. Guaranteed, on any MLflow server with one database: of promotions, rollbacks and registrations by pixelclip that
meet, each decides on what the one before it left, and `previous` is the champion before. One that is killed before it moves
an alias has moved nothing; one that is killed between two aliases is completed by the next. Not guaranteed: anything against
aliases that somebody sets by hand meanwhile; and a process that hangs for a minute (`_DEAD_SECONDS`) between its decision and
its last alias may overwrite a promotion that has taken it for dead.
"""

import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from pixelclip.config import RegisterConfig, nearest
from pixelclip.server import connect, first_line, is_missing, tracking_uri

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
GATE = "gate"
"""Tag of a version: its role and why."""
_TURN = "promotion."
_POLL_SECONDS, _DEAD_SECONDS = 0.2, 60.0


@dataclass(frozen=True)
class Figures:
    """What the gate looks at: mIoU and gain in points, and what they were measured on (labelled set and protocol)."""

    miou: float
    gain: float
    measured_on: str


@dataclass(frozen=True)
class Decision:
    """Whether a model becomes champion, and why."""

    champion: bool
    reason: str


def decide(candidate: Figures, champion: Figures | None, min_gain: float) -> Decision:
    """The gate.

    Raises:
        ValueError: a figure is not a finite number.
    """
    for figures in filter(None, (candidate, champion)):
        if not (math.isfinite(figures.miou) and math.isfinite(figures.gain)):
            raise ValueError(f"the gate needs finite figures, found mIoU {figures.miou} and gain {figures.gain}")
    if candidate.gain < min_gain:
        return Decision(False, f"gain {candidate.gain:.2f} over CLIP is below register.min_gain {min_gain:g}")
    if champion is None:
        return Decision(True, f"gain {candidate.gain:.2f} over CLIP, and there was no champion")
    if champion.measured_on != candidate.measured_on:
        return Decision(
            False,
            "the champion was measured on another labelled set or protocol, or by an older pixelclip; measure it on this one: "
            "pixelclip evaluate --model models:/NAME@champion, then pixelclip register with that evaluation",
        )
    versus = f"mIoU {candidate.miou:.2f} against the champion's {champion.miou:.2f}"
    return Decision(candidate.miou > champion.miou, versus)


def run(name: str, version: int, force: str = "") -> Decision:
    """Makes a registered version the champion if it passes the gate; the champion before becomes `previous`.

    Args:
        name: of the registered model.
        version: its version.
        force: why the gate's refusal is overruled, which is recorded; empty: it is not.

    Returns:
        The decision; if it is no, nothing was changed.

    Raises:
        ValueError: no such model or version, a figure that is missing or not finite, or MLflow is unreachable.
    """
    with registry(name) as client:
        decision = pass_gate(client, name, str(version), force=force)
    print(f"promote: {name} version {version} is {'champion' if decision.champion else 'not promoted'}: {decision.reason}")
    return decision


def rollback(name: str) -> str:
    """Makes `previous` the champion again; the champion becomes `previous`, so that a second rollback undoes the first.

    Args:
        name: of the registered model.

    Returns:
        The version that is champion now.

    Raises:
        ValueError: no such model, there is no `previous`, or MLflow is unreachable.
    """
    with registry(name) as client, _Turn(client, name) as turn:
        aliases = turn.aliases()
        champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        if previous is None or previous == champion:
            raise ValueError(f"{name}: there is no champion before this one; its aliases are {_in_words(aliases)}")
        turn.move(({PREVIOUS: champion} if champion else {}) | {CHAMPION: previous})
        if champion:
            client.set_model_version_tag(name, champion, GATE, f"previous: rolled back to version {previous}")
        client.set_model_version_tag(name, previous, GATE, f"champion: rolled back from version {champion}")
    print(f"promote: {name} version {previous} is champion again; version {champion} was")
    return previous


def pass_gate(
    client: MlflowClient,
    name: str,
    version: str,
    *,
    force: str = "",
    challenge: bool = False,
    measured: Mapping[str, str] | None = None,
) -> Decision:
    """Decides on a version and moves the aliases, in its turn.

    Args:
        client: a connected client.
        name: of the registered model.
        version: its version; its tags hold its figures.
        force: see `run`.
        challenge: a version that is refused becomes `challenger`.
        measured: tags of a new measurement to write first, `measured_on` among them.

    Raises:
        ValueError: a figure is missing or not finite; nothing was changed.
    """
    with _Turn(client, name) as turn:
        if measured:
            _write_figures(client, name, version, measured)
        aliases = turn.aliases()
        champion = aliases.get(CHAMPION)
        if champion == version:
            return Decision(True, "it is the champion already")
        decision = _judge(client, name, version, champion, force)
        if decision.champion:
            moves: dict[str, str | None] = {PREVIOUS: champion} if champion else {}
            moves[CHAMPION] = version
            if aliases.get(CHALLENGER) == version:
                moves[CHALLENGER] = None
            turn.move(moves)
        elif challenge:
            turn.move({CHALLENGER: version})
        if decision.champion or challenge:
            role = CHAMPION if decision.champion else CHALLENGER
            client.set_model_version_tag(name, version, GATE, f"{role}: {decision.reason}")
        return decision


def _write_figures(client: MlflowClient, name: str, version: str, measured: Mapping[str, str]) -> None:
    # Tags are written one by one: without this one, figures are none (`figures_of`), so half of them cannot be taken for all.
    client.delete_model_version_tag(name, version, "measured_on")
    for key, value in sorted(measured.items(), key=lambda tag: tag[0] == "measured_on"):
        client.set_model_version_tag(name, version, key, value)


def _judge(client: MlflowClient, name: str, version: str, champion: str | None, force: str) -> Decision:
    candidate = client.get_model_version(name, version)
    min_gain = float(candidate.tags.get("min_gain", RegisterConfig().min_gain))
    try:
        against = figures_of(client.get_model_version(name, champion)) if champion else None
        decision = decide(figures_of(candidate), against, min_gain)
    except ValueError as error:
        if not force:
            raise
        decision = Decision(False, str(error))
    if decision.champion or not force:
        return decision
    client.set_model_version_tag(name, version, "forced", force)
    return Decision(True, f"forced, {force}; the gate said: {decision.reason}")


def figures_of(version: ModelVersion) -> Figures:
    """The figures in the tags of a registered version.

    Raises:
        ValueError: one is missing or is no finite number.
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
    return Figures(values[0], values[1], version.tags["measured_on"])


@contextmanager
def registry(name: str) -> Iterator[MlflowClient]:
    """A client; what MLflow refuses is one message."""
    client = connect()
    try:
        yield client
    except MlflowException as error:
        if is_missing(error) and "Registered Model" in error.message:
            known = [model.name for model in client.search_registered_models()]
            hint = nearest(name, known) or f"; there are {', '.join(known) or 'none'}"
            raise ValueError(f"{name}: no such registered model at {tracking_uri()}{hint}") from None
        raise ValueError(f"{name}: refused by MLflow at {tracking_uri()}: {first_line(error)}") from None


class _Turn:
    """The right to move the aliases of one registered model, while nobody else has it.

    Args:
        client: a connected client.
        name: of the registered model.
    """

    def __init__(self, client: MlflowClient, name: str) -> None:
        self._client, self._name = client, name
        self._tag = f"{_TURN}{uuid.uuid4().hex}"
        self._claim: dict[str, Any] = {}
        self._written = 0.0

    def __enter__(self) -> "_Turn":
        self._write(number=0)  # still choosing: whoever sees this waits for the number
        try:
            number = 1 + max((claim["number"] for claim in self._others().values()), default=0)
            self._write(number=number)
            self._wait()
        except BaseException:
            self._withdraw()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not self._claim.get("moves"):
            self._withdraw()
        else:  # the tag says what is half done, for the next one
            print(f"promote: {self._name}: interrupted between two aliases; the next promotion or rollback completes it")

    def aliases(self) -> dict[str, str]:
        """The model's aliases with their versions."""
        return _aliases(self._client.get_registered_model(self._name))

    def move(self, moves: Mapping[str, str | None]) -> None:
        """Points aliases to versions, or removes those without.

        Raises:
            ValueError: MLflow has been so slow that others take this process for dead; nothing is moved.
        """
        if time.monotonic() - self._written > _DEAD_SECONDS / 2:
            raise ValueError(f"{self._name}: MLflow at {tracking_uri()} is too slow, nothing was promoted; try again")
        self._write(moves=dict(moves))
        _apply(self._client, self._name, moves)
        self._write(moves={})

    def _write(self, **changes: Any) -> None:
        self._claim |= changes | {"beat": self._claim.get("beat", 0) + 1}
        self._client.set_registered_model_tag(self._name, self._tag, json.dumps(self._claim))
        self._written = time.monotonic()

    def _withdraw(self) -> None:
        self._client.delete_registered_model_tag(self._name, self._tag)

    def _others(self) -> dict[str, dict[str, Any]]:
        tags = self._client.get_registered_model(self._name).tags
        return {tag: json.loads(value) for tag, value in tags.items() if tag.startswith(_TURN) and tag != self._tag}

    def _wait(self) -> None:
        """Waits for the smaller numbers; one that has not moved for a while is dead, and what it left is completed."""
        seen: dict[str, tuple[int, float]] = {}
        while True:
            now = time.monotonic()
            waiting, dead = False, {}
            for tag, claim in self._others().items():
                if claim["number"] and (claim["number"], tag) > (self._claim["number"], self._tag):
                    continue
                beat, since = seen.get(tag, (claim["beat"], now))
                seen[tag] = (beat, since) if beat == claim["beat"] else (claim["beat"], now)
                if now - seen[tag][1] > _DEAD_SECONDS:
                    dead[tag] = claim
                else:
                    waiting = True
            if not waiting:
                break
            if now - self._written > _DEAD_SECONDS / 10:
                self._write()
            time.sleep(_POLL_SECONDS)
        for tag, claim in dead.items():
            if claim.get("moves"):
                print(f"promote: {self._name}: completing a promotion that was killed: {_in_words(claim['moves'])}")
                _apply(self._client, self._name, claim["moves"])
            self._client.delete_registered_model_tag(self._name, tag)


def _apply(client: MlflowClient, name: str, moves: Mapping[str, str | None]) -> None:
    for alias, version in moves.items():
        if version is None:
            client.delete_registered_model_alias(name, alias)
        else:
            client.set_registered_model_alias(name, alias, version)


def _aliases(model: RegisteredModel) -> dict[str, str]:
    return {alias: str(version) for alias, version in model.aliases.items()}


def _in_words(moves: Mapping[str, str | None]) -> str:
    return ", ".join(f"{alias} {version or 'removed'}" for alias, version in moves.items()) or "none"
