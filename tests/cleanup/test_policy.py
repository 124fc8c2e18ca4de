"""Policies by age, number and size, against a naive statement of their rules."""

import itertools
import random

import pytest

from pixelclip.cleanup.policy import GRACE, Item, Policy, decide

NOW, DAY = 1e9, 86400
GB = 10**9


def item(days: float, size: int = GB, **options) -> Item:
    return Item(f"{days:g}", size, NOW - days * DAY, lambda: None, **options)


def gone(items, **limits) -> list[str]:
    return sorted((each.item.name for each in decide(items, Policy(**limits), NOW) if each.goes), key=float)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"older_than": "3d"}, ["4", "5"]),
        ({"older_than": "72h"}, ["4", "5"]),
        ({"older_than": "3d", "keep": 4}, ["5"]),
        ({"keep": 2}, ["3", "4", "5"]),
        ({"max_size": "2.5GB"}, ["3", "4", "5"]),
        ({"max_size": "2.5 gb", "keep": 4}, ["5"]),
        ({"max_size": "4GB", "older_than": "3d"}, ["4", "5"]),
        ({"max_size": "1GB", "older_than": "3d", "keep": 2}, ["3", "4", "5"]),
        ({"max_size": "5GB"}, []),
        ({"keep": 0}, ["1", "2", "3", "4", "5"]),
    ],
)
def test_limits_combine(limits, expected):
    assert gone([item(days) for days in (3, 1, 5, 2, 4)], **limits) == expected


def test_what_must_stay_counts_but_never_goes():
    items = [item(1, kept="named"), item(2), item(3, kept="named"), item(4)]
    assert gone(items, keep=0) == ["2", "4"]
    assert gone(items, keep=2) == ["4"]
    assert gone(items, max_size="3GB") == ["4"]
    assert gone(items, max_size="1MB") == ["2", "4"]
    reasons = {each.item.name: each.reason for each in decide(items, Policy(max_size="3GB"), NOW)}
    assert reasons == {"1": "named", "2": "within 3GB", "3": "named", "4": "beyond 3GB"}


@pytest.mark.parametrize("limits", [{"keep": 0}, {"max_size": "1KB"}, {"older_than": "1m"}])
def test_what_changed_within_the_last_hour_stays(limits):
    assert gone([item((GRACE - 1) / DAY), item((GRACE + 1) / DAY)], **limits) == [f"{(GRACE + 1) / DAY:g}"]


def test_unfinished_work_goes_by_age_only_and_leftovers_always():
    items = [item(2, resumable=True), item(5, resumable=True), item(0, leftover=True)]
    assert gone(items, keep=0) == ["0"]
    assert gone(items, max_size="1KB") == ["0"]
    assert gone(items, older_than="3d", max_size="1KB") == ["0", "5"]


def test_limits_hold_for_random_stores():
    generator = random.Random(0)
    for older, keep, size in itertools.product(("", "10d"), (None, 0, 3), ("", "7GB")):
        if not older and keep is None and not size:
            continue
        for _ in range(50):
            items = [item(days, generator.randrange(1, 3) * GB) for days in generator.sample(range(1, 30), 12)]
            verdicts = decide(items, Policy(older, keep, size), NOW)
            stay = [each.item for each in verdicts if not each.goes]
            newest = sorted(items, key=lambda each: -each.changed)[: keep or 0]
            assert all(each in stay for each in newest)
            others = [each for each in stay if each not in newest]
            assert not older or all(NOW - each.changed <= 10 * DAY for each in others)
            assert not size or sum(each.size for each in stay) <= 7 * GB or not others
            assert all(each.reason for each in verdicts)
            if others and size:  # the next older one that went would not have fitted, or was too old
                more = max((each.item for each in verdicts if each.goes), key=lambda each: each.changed, default=None)
                too_old = more is None or (older and NOW - more.changed > 10 * DAY)
                assert too_old or sum(each.size for each in [*stay, more]) > 7 * GB
            if not older and not size:
                assert not others


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "gc needs a policy: --older-than, --keep or --max-size"),
        ({"older_than": "30"}, "--older-than '30': must be a number and one of m, h, d, w, for example 30d, 12h or 4w"),
        ({"older_than": "-1d"}, "--older-than '-1d': must be"),
        (
            {"max_size": "50"},
            "--max-size '50': must be a number and one of KB, MB, GB, TB, KIB, MIB",
        ),
    ],
)
def test_invalid_limit_is_an_error(limits, message):
    with pytest.raises(ValueError, match=r".") as error:
        Policy(**limits)
    assert str(error.value).startswith(message)
