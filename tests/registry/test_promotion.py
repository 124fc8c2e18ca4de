"""Promotion and rollback of registered versions, also by concurrent processes."""

import pytest
from mlflow import MlflowClient

from helpers import promotions
from helpers.promotions import NAME, add, aliases, meet
from pixelclip.registry import promotion
from pixelclip.registry.gate import Decision
from pixelclip.registry.promotion import rollback, run

client, uri = promotions.client, promotions.uri


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(promotion, "_SETTLE_SECONDS", 0.0)


def tags_of(client: MlflowClient, version: str) -> dict[str, str]:
    return client.get_model_version(NAME, version).tags


def test_first_version_becomes_champion(client, capsys):
    add(client, NAME)
    decision = run(NAME, 1)
    assert decision == Decision(True, "gain 10.00 over CLIP, and there was no champion")
    assert aliases(client) == {"champion": "1"}
    assert tags_of(client, "1")["gate"].startswith("champion: gain 10.00")
    assert "demo version 1 is champion" in capsys.readouterr().out


def test_better_challenger_becomes_champion(client):
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
        ({"miou": 99, "measured_on": "another set"}, "a different labelled set or protocol"),
        ({"miou": 99, "gain": 4, "min_gain": 5}, r"gain 4.00 over CLIP is below register.min_gain 5"),
    ],
)
def test_champion_stays_unless_the_gate_is_overruled(client, capsys, tags, reason):
    add(client, NAME)
    add(client, NAME, **tags)
    run(NAME, 1)
    assert not run(NAME, 2).champion
    assert aliases(client) == {"champion": "1"} and "gate" not in tags_of(client, "2")
    output = capsys.readouterr().out
    assert "demo version 2 is not promoted: " in output and reason in output

    decision = run(NAME, 2, force="the old one is broken")
    assert decision.champion and reason in decision.reason
    assert aliases(client) == {"champion": "2", "previous": "1"}
    assert tags_of(client, "2")["forced"] == "the old one is broken"
    assert tags_of(client, "2")["gate"].startswith("champion: forced, the old one is broken; the gate rejected it: ")
    assert "the gate rejected it" in capsys.readouterr().out


@pytest.mark.parametrize("whose", ["the challenger's", "the champion's"])
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
def test_missing_or_invalid_metric_raises(client, whose, tags, message):
    mine = whose == "the challenger's"
    add(client, NAME, **({} if mine else tags))
    add(client, NAME, **({"miou": 50} | tags if mine else {"miou": 50}))
    client.set_registered_model_alias(NAME, "champion", "1")
    with pytest.raises(ValueError, match=f"demo version {2 if mine else 1}: {message}"):
        run(NAME, 2)
    assert aliases(client) == {"champion": "1"}
    assert run(NAME, 2, force="I looked").champion
    assert aliases(client) == {"champion": "2", "previous": "1"}


def test_second_rollback_undoes_the_first(client, capsys):
    for miou in (40, 41, 42):
        add(client, NAME, miou=miou)
    run(NAME, 1)
    with pytest.raises(ValueError, match=r"no previous champion to roll back to \(aliases: champion 1\)"):
        rollback(NAME)
    run(NAME, 2)
    run(NAME, 3)
    assert aliases(client) == {"champion": "3", "previous": "2"}
    assert rollback(NAME) == "2"
    assert aliases(client) == {"champion": "2", "previous": "3"}
    assert tags_of(client, "2")["gate"] == "champion: rolled back from version 3"
    assert tags_of(client, "3")["gate"] == "previous: rolled back to version 2"
    assert "rolled back from version 3 to version 2" in capsys.readouterr().out
    assert rollback(NAME) == "3"
    assert aliases(client) == {"champion": "3", "previous": "2"}


def test_unknown_model_or_version_is_named(client):
    add(client, NAME)
    with pytest.raises(ValueError, match=r"dmo: no such registered model at sqlite:.*did you mean 'demo'"):
        run("dmo", 1)
    with pytest.raises(ValueError, match=r"dmo: no such registered model"):
        rollback("dmo")
    with pytest.raises(ValueError, match=r"demo: rejected by MLflow at .*version=7\) not found"):
        run(NAME, 7)
    with pytest.raises(ValueError, match=r"a/b: rejected by MLflow at .*Invalid model name"):
        run("a/b", 1)


def test_a_promotion_that_fails_between_two_aliases_leaves_the_champion_and_can_be_repeated(client, monkeypatch):
    for miou in (40, 41):
        add(client, NAME, miou=miou)
    run(NAME, 1)
    set_alias = MlflowClient.set_registered_model_alias

    def fail_at_champion(self, name, alias, version):
        if alias == "champion":
            raise ConnectionError("gone")
        set_alias(self, name, alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", fail_at_champion)
        with pytest.raises(ConnectionError):
            run(NAME, 2)
    assert aliases(client)["champion"] == "1"
    with pytest.raises(ValueError, match="no previous champion to roll back to"):
        rollback(NAME)
    assert run(NAME, 2).champion
    assert aliases(client) == {"champion": "2", "previous": "1"}


def interrupt_with(monkeypatch, client: MlflowClient, moves: dict[str, str], times: int = 1) -> None:
    """Let another process move aliases right after ours were moved."""
    settled, left = promotion._settled, [times]

    def move_first(*arguments):
        if left[0]:
            left[0] -= 1
            for alias, version in moves.items():
                client.set_registered_model_alias(NAME, alias, version)
        return settled(*arguments)

    monkeypatch.setattr(promotion, "_settled", move_first)


def test_an_overwritten_promotion_decides_again_and_the_best_version_wins(client, monkeypatch):
    for miou in (40, 41, 42):
        add(client, NAME, miou=miou)
    run(NAME, 1)
    interrupt_with(monkeypatch, client, {"previous": "1", "champion": "2"})
    assert run(NAME, 3) == Decision(True, "mIoU 42.00 against the champion's 41.00")
    assert aliases(client) == {"champion": "3", "previous": "2"}


def test_an_overwritten_promotion_yields_to_a_better_version(client, monkeypatch):
    for miou in (40, 41, 42):
        add(client, NAME, miou=miou)
    run(NAME, 1)
    interrupt_with(monkeypatch, client, {"previous": "1", "champion": "3"})
    assert run(NAME, 2) == Decision(False, "mIoU 41.00 against the champion's 42.00")
    assert aliases(client) == {"champion": "3", "previous": "1"} and "gate" not in tags_of(client, "2")


def test_forced_promotions_against_each_other_end_with_an_error(client, monkeypatch):
    for miou in (40, 41):
        add(client, NAME, miou=miou)
    interrupt_with(monkeypatch, client, {"champion": "1"}, times=100)
    with pytest.raises(ValueError, match="demo: other processes keep moving the alias 'champion'; try again"):
        run(NAME, 2, force="mine")
    assert aliases(client) == {"champion": "1", "previous": "1"}


def test_a_rollback_that_meets_a_promotion_is_an_error(client, monkeypatch):
    for miou in (40, 41, 42):
        add(client, NAME, miou=miou)
    run(NAME, 1)
    run(NAME, 2)
    interrupt_with(monkeypatch, client, {"previous": "2", "champion": "3"})
    with pytest.raises(ValueError, match="demo: another process has just made version 3 the champion"):
        rollback(NAME)


@pytest.mark.parametrize(("challengers", "trials"), [(2, 4), pytest.param(4, 20, marks=pytest.mark.services)])
def test_concurrent_promotions_end_with_the_best_as_only_champion(uri, challengers, trials):
    meet(uri, challengers, trials)
