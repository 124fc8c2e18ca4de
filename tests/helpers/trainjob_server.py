"""Server with the part of Kubernetes' API that creates, reads and deletes TrainJobs."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs

import yaml

from helpers.json_server import JsonHandler, served


@dataclass
class FakeKubernetes:
    """TrainJobs, and the result of each poll: a condition, a status, `gone`, `hang`, an HTTP status, or None for running."""

    url: str = ""
    jobs: dict[str, dict] = field(default_factory=dict)
    fate: list[object] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    refuse: int = 0
    polls: int = 0
    pods: list[dict] | int = 403
    """Pods of the nodes, or the status of the answer to who lists them."""
    selectors: list[str] = field(default_factory=list)


@contextlib.contextmanager
def fake_kubernetes() -> Iterator[FakeKubernetes]:
    held = FakeKubernetes()

    class Handler(JsonHandler):
        def do_POST(self):
            body = json.loads(self.body())
            held.log.append(f"create {body['metadata']['name']}")
            if held.refuse:
                self.answer(held.refuse, {"kind": "Status", "message": "trainjobs is forbidden to pipeline-runner"})
                return
            held.jobs[body["metadata"]["name"]] = body
            self.answer(201, body)

        def do_GET(self):
            path, _, query = self.path.partition("?")
            if path == "/api/v1/namespaces/default/pods":
                held.selectors += parse_qs(query)["labelSelector"]
                refused = isinstance(held.pods, int)
                message = {"message": "pods is forbidden to pipeline-runner"}
                self.answer(held.pods if refused else 200, message if refused else {"items": held.pods})
                return
            held.polls += 1
            name = self.path.rpartition("/")[2]
            if name not in held.jobs:
                self.answer(404, {"message": "not found"})
                return
            fate = held.fate.pop(0) if held.fate and not held.jobs[name].get("status") else None
            if fate == "hang":
                time.sleep(30)
            if isinstance(fate, int):
                self.answer(fate, {"message": "try later"})
                return
            if fate == "gone":
                del held.jobs[name]
                self.answer(404, {"message": "not found"})
                return
            if isinstance(fate, dict) and "type" not in fate:
                self.answer(200, held.jobs[name] | {"status": fate})
                return
            if fate:
                held.jobs[name]["status"] = {"conditions": [{"type": "Suspended", "status": "False"}, fate]}
            self.answer(200, held.jobs[name])

        def do_PUT(self):
            name, body = self.path.rpartition("/")[2], json.loads(self.body())
            held.log.append(f"replace {name}")
            if held.refuse:
                self.answer(held.refuse, {"kind": "Status", "message": "trainjobs is forbidden to pipeline-runner"})
                return
            held.jobs[name] = body
            self.answer(200, body)

        def do_DELETE(self):
            name = self.path.partition("?")[0].rpartition("/")[2]
            held.log.append(f"delete {name}")
            if held.refuse:
                self.answer(held.refuse, {"kind": "Status", "message": "trainjobs is forbidden to pipeline-runner"})
                return
            self.answer(200, held.jobs.pop(name, {}))

    with served(Handler) as held.url:
        yield held


def ends(kind: str, reason: str = "", message: str = "") -> dict:
    return {"type": kind, "status": "True", "reason": reason, "message": message}


def kubeconfig(path: Path, url: str) -> Path:
    """Write a kubeconfig for a server."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "clusters": [{"name": "here", "cluster": {"server": url}}],
        "users": [{"name": "me", "user": {}}],
    }
    path.write_text(yaml.safe_dump(document))
    return path
