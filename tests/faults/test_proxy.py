"""A proxy that damages what passes between pixelclip and an S3 or file server: noticed, or harmless, in every trial."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

from helpers import faults, services, tiny
from helpers.faults_proxy import Damage, Message, Proxy, damaging_proxy
from helpers.json_server import served
from helpers.s3_sources import put, sources
from pixelclip.models.checkpoint import load_model
from pixelclip.storage.download import local_copy
from pixelclip.storage.files import digest
from pixelclip.storage.upload import upload_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TRIALS = 40
PART = 5 << 20
KINDS = ("flip", "truncate", "shorten", "lengthen")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[services.S3]:
    with services.s3_server(tmp_path_factory.mktemp("services")) as store:
        store.server.wait()
        yield store


@pytest.fixture
def proxy(store, cache, monkeypatch) -> Iterator[Proxy]:
    with damaging_proxy(store.endpoint) as proxy:
        for name, value in (store.environment() | {"AWS_ENDPOINT_URL": proxy.url}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("pixelclip.storage.upload._PART", PART)
        yield proxy


def trial(random: np.random.Generator, kind: str, always: bool, messages: int) -> Damage:
    """Return a function that damages one random message of the first few, or all of them."""
    chosen, seen = int(random.integers(messages)), iter(range(1 << 30))

    def damage(message: Message) -> None:
        if next(seen) == chosen or always:
            getattr(message, kind)(random.uniform())

    return damage


def count(name: str, attempt: Callable[[Damage], str], messages: int, kinds: tuple[str, ...] = KINDS) -> None:
    """Call `attempt` with the damage of each trial; it returns the outcome."""
    random, outcomes = np.random.default_rng(), Counter[str]()
    for number in range(TRIALS):
        kind, always = kinds[number % len(kinds)], number // len(kinds) % 2 == 1
        try:
            outcome = attempt(trial(random, kind, always, messages))
        except ValueError as error:
            clean = type(error) is not UnicodeError and "\n" not in str(error) and len(str(error)) < 1000
            outcome = "clean error" if clean else f"crash: {error!r}"
        except Exception as error:
            outcome = f"crash: {error!r}"
        outcomes[outcome if outcome in ("right result", "clean error") else f"{kind}{' always' * always}: {outcome}"] += 1
    survived = outcomes["right result"] + outcomes["clean error"]
    counts = ", ".join(f"{outcomes[each]} {each}" for each in ("right result", "clean error"))
    faults.record(f"{name} through a proxy that damages bytes ({counts})", TRIALS, survived)
    assert survived == TRIALS, outcomes


def content(folder: Path) -> dict[str, bytes]:
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def made(folder: Path, name: str) -> Path:
    """Write what is transferred."""
    if name == "shards":
        return sources(folder)
    if name == "model":
        return tiny.model_folder(folder, tiny.clip_folder(folder.with_name("clip")))
    folder.mkdir()
    (folder / "file").write_bytes(np.random.default_rng(1).bytes(2 * PART + 7 if "parts" in name else 200_000))
    return folder


@pytest.mark.parametrize("name", ["file", "file in parts", "file in parts of others", "shards", "model"])
def test_damaged_download_from_s3_is_never_taken_for_right(store, proxy, cache, tmp_path, name):
    folder = made(tmp_path / "made", name)
    if name == "file in parts of others":
        store.client().upload_file(str(folder / "file"), "data", f"{name}/file")
    elif "parts" in name:
        upload_folder(folder, f"s3://data/{name}", last="file")
    else:
        put(store.client(), folder, name)
    expected, number = content(folder), iter(range(TRIALS))

    def attempt(damage: Damage) -> str:
        proxy.answer = damage
        single = name.startswith("file") and next(number) % 2
        try:
            copy = local_copy(f"s3://data/{name}/file" if single else f"s3://data/{name}")
            if name == "model":
                load_model(copy)
            return "right result" if content(copy) in (expected, {"": expected.get("file")}) else "silently different"
        finally:
            proxy.answer = lambda message: None
            for path in sorted(cache.rglob("*"), reverse=True):  # the next trial downloads again
                path.rmdir() if path.is_dir() else path.unlink()

    count(f"Download of {name} from S3", attempt, messages=min(4, 1 + len(expected)))


@pytest.mark.parametrize("name", ["file", "file in parts", "shards"])
def test_damaged_upload_to_s3_is_never_taken_for_right(store, proxy, tmp_path, name):
    folder, number, client = made(tmp_path / "made", name), iter(range(TRIALS)), store.client()
    expected = content(folder)
    last = max(expected)

    def attempt(damage: Damage) -> str:
        target = f"up/{name}/{next(number)}"
        proxy.request = damage
        try:
            upload_folder(folder, f"s3://data/{target}", last)
        finally:
            proxy.request = lambda message: None
            keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="data", Prefix=f"{target}/").get("Contents", [])]
            found = {key.removeprefix(f"{target}/"): client.get_object(Bucket="data", Key=key)["Body"].read() for key in keys}
            wrong = [key for key in found if found[key] != expected[key]]
            assert not wrong, f"damaged in the store: {wrong}"
        return "right result" if found == expected else "incomplete without an error"

    count(f"Upload of {name} to S3", attempt, messages=min(3, len(expected) + ("parts" in name)))


def test_cut_or_changed_length_of_a_download_by_http_is_noticed(cache, tmp_path):
    folder = made(tmp_path / "made", "file")
    expected = content(folder / "file")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with served(partial(Handler, directory=str(folder))) as url, damaging_proxy(url) as proxy:  # type: ignore[arg-type]

        def attempt(damage: Damage) -> str:
            proxy.answer = damage
            copy = local_copy(f"{proxy.url}/file")
            same = content(copy) == expected
            copy.unlink()
            return "right result" if same else "silently different"

        count("Download by HTTP", attempt, messages=1, kinds=KINDS[1:])


def test_proxy_without_damage_changes_nothing(store, proxy, cache, tmp_path):
    folder = made(tmp_path / "made", "file in parts")
    upload_folder(folder, "s3://data/right", last="file")
    assert digest(local_copy("s3://data/right")) == digest(folder)
