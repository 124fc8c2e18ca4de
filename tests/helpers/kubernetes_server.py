"""Fake server with the part of Kubernetes' API that reads objects and reviews access, and a kubeconfig for it."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from helpers.json_server import JsonHandler, served


@dataclass
class FakeCluster:
    """Objects by their path in the API, paths that are refused, and the verbs that a service account has.

    A path ends with the name of an object, or with a kind that is listed.
    """

    url: str = ""
    objects: dict[str, Any] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    verbs: set[str] = field(default_factory=set)
    reviewed: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, name: str, namespace: str = "kubeflow", **content: Any) -> dict[str, Any]:
        """Store an object of the core API."""
        entry = {"metadata": {"name": name, "namespace": namespace}, **content}
        self.objects[f"/api/v1/namespaces/{namespace}/{kind}/{name}"] = entry
        return entry

    def node(self, name: str, labels: dict[str, str] | None = None, taints: Any = (), **allocatable: str) -> None:
        """Add a node; the name of a resource may have `_` for `.` and `__` for `/`."""
        amounts = {key.replace("__", "/").replace("_", "."): value for key, value in allocatable.items()}
        spec = {"taints": [{"key": key, "value": value, "effect": effect} for key, value, effect in taints]}
        nodes = self.objects.setdefault("/api/v1/nodes", {"items": []})["items"]
        nodes.append({"metadata": {"name": name, "labels": labels or {}}, "spec": spec, "status": {"allocatable": amounts}})


@contextlib.contextmanager
def fake_cluster(kubeconfig: Path) -> Iterator[FakeCluster]:
    """Start the server on a free port and write a kubeconfig for it."""
    held = FakeCluster()

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path in held.refused:
                self.answer(403, {"kind": "Status", "message": f"forbidden: {path}", "reason": "Forbidden"})
            elif path in held.objects:
                self.answer(200, held.objects[path])
            elif path.endswith("/pods"):
                self.answer(200, {"items": []})
            else:
                self.answer(404, {"kind": "Status", "message": f"not found: {path}", "reason": "NotFound"})

        def do_POST(self) -> None:
            spec = json.loads(self.body())["spec"]
            held.reviewed.append(spec)
            allowed = spec["resourceAttributes"]["verb"] in held.verbs
            self.answer(201, {"spec": spec, "status": {"allowed": allowed}})

    with served(Handler) as held.url:
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "clusters": [{"name": "here", "cluster": {"server": held.url}}],
            "users": [{"name": "me", "user": {}}],
        }
        kubeconfig.write_text(yaml.safe_dump(document))
        yield held
