"""Fake server with the part of KFP's API that `pixelclip pipeline submit | status | logs | cancel | schedule` use.

Like KFP's server it stores all entries and accepts any run parameter.
"""

import contextlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.parser import BytesParser
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from helpers.json_server import JsonHandler, served
from pixelclip_pipelines.submit import ENDPOINTS, TOKEN

NOW = "2026-01-02T03:04:05Z"
_BELOW = "/apis/v2beta1/"
_KINDS = {  # path: (name of the id, name of a list's entries)
    "pipelines": ("pipeline_id", "pipelines"),
    "versions": ("pipeline_version_id", "pipeline_versions"),
    "experiments": ("experiment_id", "experiments"),
    "runs": ("run_id", "runs"),
    "recurringruns": ("recurring_run_id", "recurringRuns"),
}


@dataclass
class FakeKfp:
    """Content of the server by kind and id, and its behaviour.

    Args:
        url: its URL.
        token: required bearer token, if not empty.
        page_size: entries per page of a list.
        gone: whether it closes every connection without an answer.
        logs: log of each pod.
    """

    url: str = ""
    token: str = ""
    page_size: int = 2
    gone: bool = False
    kept: dict[str, dict[str, dict[str, Any]]] = field(default_factory=lambda: {kind: {} for kind in _KINDS})
    asked: list[str] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Return all entries of a kind, oldest first."""
        return list(self.kept[kind].values())

    def add(self, kind: str, entry: dict[str, Any]) -> dict[str, Any]:
        """Store an entry under a new id."""
        name, _ = _KINDS[kind]
        entry = {**entry, name: entry.get(name) or str(uuid.uuid4()), "created_at": NOW}
        self.kept[kind][entry[name]] = entry
        return entry


@contextlib.contextmanager
def fake_kfp() -> Iterator[FakeKfp]:
    """Start the server on a free port."""
    held = FakeKfp()

    class Handler(_Handler):
        fake = held

    with served(Handler) as held.url:
        yield held


class _Handler(JsonHandler):
    fake: FakeKfp

    def _dispatch(self, method: str) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = self.body()
        if self.fake.gone:
            self.connection.close()
            return
        if self.fake.token and self.headers.get("Authorization") != f"Bearer {self.fake.token}":
            self.answer(401, {"error": "Unauthorized", "message": "no valid token"})
            return
        self.fake.asked.append(f"{method} {url.path}")
        if url.path.startswith("/apis/v1alpha1/runs/") and url.path.endswith("/log"):
            self._log(url.path.split("/")[-2])
            return
        words = url.path.removeprefix(_BELOW).split("/")
        if words == ["healthz"]:
            self.answer(200, {"multi_user": False})
        elif method == "POST" and words == ["pipelines"] and self._same(json.loads(body)):
            self.answer(409, {"error": "AlreadyExists", "message": "The name pixelclip already exist."})
        elif words == ["pipelines", "upload_version"]:
            self.answer(200, self._version(body, query))
        elif method == "POST" and words[-1] in _KINDS:
            entry = json.loads(body)
            if words[-1] == "recurringruns":
                entry["status"] = "ENABLED"
            self.answer(200, self.fake.add(words[-1], {"state": "PENDING", **entry} if words[-1] == "runs" else entry))
        elif method == "GET" and words[-1] in _KINDS:
            self.answer(200, self._page(words, query))
        elif method == "POST" and words[0] == "runs" and words[1].endswith(":terminate"):
            self.fake.kept["runs"][words[1].removesuffix(":terminate")]["state"] = "CANCELING"
            self.answer(200, {})
        elif words[2:3] == ["versions"] and words[3] in self.fake.kept["versions"]:
            self.answer(200, self.fake.kept["versions"][words[3]])
        elif words[0] in _KINDS and len(words) == 2 and words[1] in self.fake.kept[words[0]]:
            entries = self.fake.kept[words[0]]
            self.answer(200, entries.pop(words[1]) and {} if method == "DELETE" else entries[words[1]])
        else:
            self.answer(404, {"error": "not found", "message": f"{words[0]} {words[-1]} not found."})

    def _log(self, pod: str) -> None:
        if pod not in self.fake.logs:
            self.answer(500, {"error": "InternalServerError", "message": f"failed to find the log of pod {pod}"})
            return
        data = self.fake.logs[pod].encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _version(self, body: bytes, query: dict[str, str]) -> dict[str, Any]:
        message = BytesParser().parsebytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body)
        (part,) = message.get_payload()
        documents = list(yaml.safe_load_all(part.get_payload(decode=True)))
        entry = {"display_name": query["name"], "pipeline_id": query["pipelineid"], "pipeline_spec": {"documents": documents}}
        entry["description"] = query.get("description", "")
        return self.fake.add("versions", entry)

    def _same(self, new: dict[str, Any]) -> bool:
        keys = [(entry["display_name"], entry.get("namespace", "")) for entry in self.fake.all("pipelines")]
        return (new["display_name"], new.get("namespace", "")) in keys

    def _page(self, words: list[str], query: dict[str, str]) -> dict[str, Any]:
        kind = words[-1]
        found = self.fake.all(kind)
        if kind == "versions":
            found = [entry for entry in found if entry["pipeline_id"] == words[1]]
        if kind == "pipelines":
            found = [entry for entry in found if entry.get("namespace", "") == query.get("namespace", "")]
        if "experiment_id" in query:
            found = [entry for entry in found if entry["experiment_id"] == query["experiment_id"]]
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            wanted = predicate.get("stringValue", predicate.get("string_value"))
            key = {"name": "display_name"}.get(predicate["key"], predicate["key"])
            found = [entry for entry in found if entry.get(key) == wanted]
        start = int(query.get("page_token") or 0)
        page = found[start : start + self.fake.page_size]
        more = {"next_page_token": str(start + len(page))} if start + len(page) < len(found) else {}
        return {_KINDS[kind][1]: page, "total_size": len(found), **more}

    def do_GET(self) -> None:
        self._dispatch("GET")

    def do_POST(self) -> None:
        self._dispatch("POST")

    def do_DELETE(self) -> None:
        self._dispatch("DELETE")


@pytest.fixture
def kfp(monkeypatch, tmp_path):
    """Start the server, without any setting of this machine that points to another one."""
    for name in (*ENDPOINTS, TOKEN, "KF_PIPELINES_UI_ENDPOINT", "PIXELCLIP_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # kfp.Client stores a context there
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "no-kubeconfig"))
    monkeypatch.chdir(tmp_path)
    with fake_kfp() as server:
        yield server


@pytest.fixture
def run(kfp, pixelclip):
    """Run a command of `pixelclip pipeline` against the server; return exit code, output and errors."""
    return lambda *words: pixelclip("pipeline", *words, "--endpoint", kfp.url)
