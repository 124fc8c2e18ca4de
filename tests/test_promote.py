"""Promotion and rollback of registered versions, one at a time, also by real processes that meet."""

import json
import multiprocessing
import os
import time

import pytest
import tiny
from mlflow import MlflowClient
from promoter import promote_again_and_again

from pixelclip import promote
from pixelclip.promote import Decision, rollback, run

NAME = "demo"


@pytest.fixture
def uri(monkeypatch, tmp_path) -> str:
    """Where the registry is; another server's URI does as well."""
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    return os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture
def client(uri) -> MlflowClient:
    return MlflowClient(uri)


def add(client: MlflowClient, name: str, **tags: object) -> str:
    """One more version, with the tags that `register` would give it."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    known = {"miou": 40.0, "gain": 10.0, "measured_on": "set", "min_gain": 1.0} | tags
    text = {tag: str(value) for tag, value in known.items() if value is not None}
    return str(client.create_model_version(name, source="s3://nowhere/model", tags=text).version)


def aliases(client: MlflowClient, name: str = NAME) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def tags_of(client: MlflowClient, version: str) -> dict[str, str]:
    return client.get_model_version(NAME, version).tags


def nothing_left(client: MlflowClient, name: str = NAME) -> bool:
    return client.get_registered_model(name).tags == {}


def test_without_a_champion(client, capsys):
    add(client, NAME)
    decision = run(NAME, 1)
    assert decision == Decision(True, "gain 10.00 over CLIP, and there was no champion")
    assert aliases(client) == {"champion": "1"} and nothing_left(client)
    assert tags_of(client, "1")["gate"].startswith("champion: gain 10.00")
    assert "demo version 1 is champion" in capsys.readouterr().out


def test_the_challenger_wins(client):
    for miou in (40, 41):
        add(client, NAME, miou=miou)
    run(NAME, 1)
    client.set_registered_model_alias(NAME, "challenger", "2")
    assert run(NAME, 2).champion
    assert aliases(client) == {"champion": "2", "previous": "1"}
    assert run(NAME, 2) == Decision(True, "it is the champion already")
    assert aliases(client) == {"champion": "2", "previous": "1"}


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"miou": 39}, "mIoU 39.00 against the champion's 40.00"),
        ({"miou": 40}, "mIoU 40.00 against the champion's 40.00"),
        ({"miou": 99, "measured_on": "another set"}, "another labelled set or protocol"),
        ({"miou": 99, "gain": 4, "min_gain": 5}, r"gain 4.00 over CLIP is below register.min_gain 5"),
    ],
)
def test_the_champion_wins_unless_it_is_overruled(client, capsys, tags, reason):
    add(client, NAME)
    add(client, NAME, **tags)
    run(NAME, 1)
    assert not run(NAME, 2).champion
    assert aliases(client) == {"champion": "1"} and "gate" not in tags_of(client, "2")
    said = capsys.readouterr().out
    assert "demo version 2 is not promoted: " in said and reason in said

    decision = run(NAME, 2, force="the old one is broken")
    assert decision.champion and reason in decision.reason
    assert aliases(client) == {"champion": "2", "previous": "1"}
    assert tags_of(client, "2")["forced"] == "the old one is broken"
    assert tags_of(client, "2")["gate"].startswith("champion: forced, the old one is broken; the gate said: ")
    assert "the gate said" in capsys.readouterr().out


@pytest.mark.parametrize("whose", ["the candidate's", "the champion's"])
@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"miou": None}, "has no tag miou"),
        ({"gain": None, "measured_on": None}, "has no tag gain, measured_on"),
        ({"miou": "nan"}, "tag miou must be a finite number, found 'nan'"),
        ({"gain": "inf"}, "tag gain must be a finite number, found 'inf'"),
        ({"miou": "good"}, "tag miou must be a finite number, found 'good'"),
    ],
)
def test_a_figure_that_is_missing_or_no_number_raises(client, whose, tags, message):
    mine = whose == "the candidate's"
    add(client, NAME, **({} if mine else tags))
    add(client, NAME, **({"miou": 50} | tags if mine else {"miou": 50}))
    client.set_registered_model_alias(NAME, "champion", "1")
    with pytest.raises(ValueError, match=f"demo version {2 if mine else 1}: {message}"):
        run(NAME, 2)
    assert aliases(client) == {"champion": "1"} and nothing_left(client)
    assert run(NAME, 2, force="I looked").champion
    assert aliases(client) == {"champion": "2", "previous": "1"}


def test_rollback_and_back_again(client, capsys):
    for miou in (40, 41, 42):
        add(client, NAME, miou=miou)
    run(NAME, 1)
    with pytest.raises(ValueError, match="no champion before this one; its aliases are champion 1"):
        rollback(NAME)
    run(NAME, 2)
    run(NAME, 3)
    assert aliases(client) == {"champion": "3", "previous": "2"}
    assert rollback(NAME) == "2"
    assert aliases(client) == {"champion": "2", "previous": "3"}
    assert tags_of(client, "2")["gate"] == "champion: rolled back from version 3"
    assert tags_of(client, "3")["gate"] == "previous: rolled back to version 2"
    assert "version 2 is champion again" in capsys.readouterr().out
    assert rollback(NAME) == "3"
    assert aliases(client) == {"champion": "3", "previous": "2"} and nothing_left(client)


def test_what_is_not_there_is_named(client):
    add(client, NAME)
    with pytest.raises(ValueError, match=r"dmo: no such registered model at sqlite:.*did you mean 'demo'"):
        run("dmo", 1)
    with pytest.raises(ValueError, match=r"dmo: no such registered model"):
        rollback("dmo")
    with pytest.raises(ValueError, match=r"demo: refused by MLflow at .*version=7\) not found"):
        run(NAME, 7)
    with pytest.raises(ValueError, match=r"a/b: refused by MLflow at .*Invalid model name"):
        run("a/b", 1)
    assert nothing_left(client)


def killed(client: MlflowClient, number: int, moves: dict[str, str | None] | None = None) -> None:
    """What a killed promotion leaves: its place in the queue, and what it was about to do."""
    claim = {"number": number, "beat": 3, "moves": moves or {}}
    client.set_registered_model_tag(NAME, "promotion.0", json.dumps(claim))


@pytest.mark.parametrize("number", [0, 1])
def test_a_promotion_that_was_killed_in_the_queue_is_not_waited_for_for_ever(client, monkeypatch, number):
    monkeypatch.setattr(promote, "_DEAD_SECONDS", 1.0)
    add(client, NAME)
    killed(client, number)
    began = time.monotonic()
    assert run(NAME, 1).champion
    assert time.monotonic() - began > 1.0
    assert aliases(client) == {"champion": "1"} and nothing_left(client)


def test_a_promotion_that_was_killed_between_two_aliases_is_completed_by_the_next(client, monkeypatch, capsys):
    monkeypatch.setattr(promote, "_DEAD_SECONDS", 1.0)
    for miou in (40, 41, 42):
        add(client, NAME, miou=miou)
    run(NAME, 1)
    client.set_registered_model_alias(NAME, "previous", "1")  # of version 2 in place of version 1, this came about
    killed(client, 1, {"previous": "1", "champion": "2"})
    assert run(NAME, 3).champion
    assert aliases(client) == {"champion": "3", "previous": "2"} and nothing_left(client)
    assert "completing a promotion that was killed: previous 1, champion 2" in capsys.readouterr().out


def test_an_error_between_two_aliases_is_completed_by_the_next(client, monkeypatch, capsys):
    monkeypatch.setattr(promote, "_DEAD_SECONDS", 1.0)
    for miou in (40, 41, 39):
        add(client, NAME, miou=miou)
    run(NAME, 1)
    point = MlflowClient.set_registered_model_alias
    calls = []

    def lose_the_second(self, name, alias, version):
        calls.append(alias)
        if len(calls) == 2:
            raise ConnectionError("gone")
        point(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", lose_the_second)
    with pytest.raises(ConnectionError):
        run(NAME, 2)
    assert aliases(client) == {"champion": "1", "previous": "1"} and calls == ["previous", "champion"]
    assert "interrupted between two aliases" in capsys.readouterr().out
    assert not run(NAME, 3).champion
    assert aliases(client) == {"champion": "2", "previous": "1"} and nothing_left(client)


def meet(uri: str, candidates: int, trials: int) -> int:
    """Lets processes promote at once, again and again, and asserts what every trial leaves; at any server.

    Returns:
        In how many trials more than one of them was champion for a moment.
    """
    client = MlflowClient(uri)
    context = multiprocessing.get_context("spawn")
    start, end, results = context.Barrier(candidates + 1), context.Barrier(candidates + 1), context.Queue()
    versions = [str(2 + number) for number in range(candidates)]
    processes = [
        context.Process(target=promote_again_and_again, args=(uri, version, trials, start, results, end))
        for version in versions
    ]
    for process in processes:
        process.start()
    taken_over = 0
    try:
        for trial in range(trials):
            name = f"trial{trial}"
            for number in range(candidates + 1):  # the champion, and the candidates, the last of them the best
                add(client, name, miou=40 + number)
            client.set_registered_model_alias(name, "champion", "1")
            start.wait(timeout=120)
            found = [results.get(timeout=120) for _ in versions]
            end.wait(timeout=120)
            assert [error for *_, error in found] == [""] * candidates
            there = aliases(client, name)
            promoted = sorted(version for version, champion, _ in found if champion)
            best = versions[-1]
            assert there["champion"] == best == promoted[-1]
            # Each that won beat the one before it, so they won in the order of their figures: `previous` is the last but one.
            assert there["previous"] == ["1", *promoted][-2]
            refused = set(versions) - set(promoted)
            assert there.get("challenger") in (refused or {None})
            assert nothing_left(client, name)
            taken_over += len(promoted) > 1
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return taken_over


@pytest.mark.parametrize(("candidates", "trials"), [(2, 4), pytest.param(4, 20, marks=pytest.mark.services)])
def test_promotions_at_once_leave_one_champion_the_best(uri, candidates, trials):
    meet(uri, candidates, trials)
