"""Server with the part of Kubernetes' API by which Experiments of Katib are created and read, and a kubeconfig for it."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from helpers.json_server import JsonHandler, served

RUNTIME = "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/torch-distributed"
_TORCH = {  # the runtime as Kubeflow Trainer installs it, shortened
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {"numProcPerNode": "auto"}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                            "spec": {"template": {"spec": {"containers": [{"name": "node", "image": "pytorch"}]}}},
                        },
                    }
                ]
            }
        },
    },
}


@dataclass
class FakeKatib:
    """Experiments by name, and an HTTP status with which requests are refused."""

    url: str = ""
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    refuse: int = 0
    asked: list[str] = field(default_factory=list)


@contextlib.contextmanager
def fake_katib(kubeconfig: Path) -> Iterator[FakeKatib]:
    """Start the server on a free port and write a kubeconfig for it."""
    held = FakeKatib()

    class Handler(JsonHandler):
        def do_POST(self) -> None:
            body = json.loads(self.body())
            held.asked.append(f"POST {self.path}")
            name = body["metadata"]["name"]
            if held.refuse:
                self.answer(held.refuse, {"kind": "Status", "message": "experiments.kubeflow.org is forbidden"})
            elif name in held.experiments:
                self.answer(409, {"kind": "Status", "message": f"{name} already exists", "reason": "AlreadyExists"})
            else:
                metadata = {
                    **body["metadata"],
                    "namespace": self.path.split("/")[5],
                    "creationTimestamp": "2026-01-02T03:04:05Z",
                }
                held.experiments[name] = {**body, "metadata": metadata}
                self.answer(201, held.experiments[name])

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            held.asked.append(f"GET {path}")
            name = path.rpartition("/")[2]
            if path == RUNTIME:
                self.answer(200, _TORCH)
            elif name == "trials":
                self.answer(200, {"apiVersion": "kubeflow.org/v1beta1", "kind": "TrialList", "metadata": {}, "items": []})
            elif "/experiments/" in path and name in held.experiments:
                self.answer(200, held.experiments[name])
            else:
                self.answer(404, {"kind": "Status", "message": f"{path} not found", "reason": "NotFound"})

    with served(Handler) as held.url:
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "kubeflow"}}],
            "clusters": [{"name": "here", "cluster": {"server": held.url}}],
            "users": [{"name": "me", "user": {}}],
        }
        kubeconfig.write_text(yaml.safe_dump(document))
        yield held
