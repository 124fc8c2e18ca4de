"""Serve a registered model: MLflow's scoring server with pages, metrics and strict params; a manifest for KServe."""

import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import mlflow.pyfunc
import yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

from pixelclip.settings import nearest
from pixelclip.storage.urls import public_url
from pixelclip.tracking.server import connect, reason_of, transfer

IMAGE = "PIXELCLIP_IMAGE"
_PORT = 8080
_URI = re.compile(r"models:/(?P<name>[^/@]+)[/@].+")
_ALIAS = re.compile(r"models:/([^/@]+)@([^/@]+)")
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>pixelclip</title><body style="font-family: sans-serif; max-width: 40em; margin: 2em auto; padding: 0 1em">
<h1>pixelclip</h1><p>This server segments images into the class names of each request, with <code>{model}</code>.</p>{rejected}
<pre>curl -H 'Content-Type: application/json' -d @request.json ADDRESS/invocations

request.json: {{"dataframe_split": {{"columns": ["image", "classes"],
                                   "data": [["BASE64 OF AN IMAGE FILE", ["dog|puppy", "grass"]]]}}}}</pre>
<p><a href="docs">API</a> · <a href="ping">health</a> · <a href="model">model</a> ·
<a href="metrics">metrics</a></p></body></html>"""
MODEL_HEADER = "pixelclip-model"
"""Header of an answer: the model that gave it, `models:/NAME/VERSION`."""


def run(model: str, host: str = "127.0.0.1", port: int = 0, uds: str | None = None, access_log: bool = True) -> None:
    """Serve a model until the process is stopped.

    Args:
        model: `models:/NAME@ALIAS`, or another URI or folder of a model logged by `register`.
        host: address to listen on.
        port: port to listen on.
        uds: Unix socket to listen on, instead of host and port.
        access_log: print a line for each request.

    Raises:
        ValueError: MLflow has no such model.
    """
    import uvicorn

    if _ALIAS.fullmatch(model):
        model = version_of(*alias_of(model))
    elif model.startswith("models:/"):
        connect()
    for name in [name for name in sys.modules if name.partition(".")[0] == "pixelclip"]:
        del sys.modules[name]  # the model contains its own version, which would mix with this one
    try:
        with transfer():
            loaded = mlflow.pyfunc.load_model(model)
    except MlflowException as error:
        raise ValueError(f"{model}: cannot be served: {reason_of(error)}") from None
    uvicorn.run(server(loaded, model), host=host, port=port, uds=uds, access_log=access_log)


def alias_of(model: str) -> tuple[str, str]:
    """Return name and alias of `models:/NAME@ALIAS`.

    Raises:
        ValueError: the URI has no alias.
    """
    match = _ALIAS.fullmatch(model)
    if match is None:
        raise ValueError(f"{model}: only an alias can be followed, models:/NAME@ALIAS")
    return match[1], match[2]


def version_of(name: str, alias: str) -> str:
    """Return the version that an alias points to as `models:/NAME/VERSION`.

    Raises:
        ValueError: there is no such alias, or MLflow is unreachable.
    """
    try:
        return f"models:/{name}/{connect().get_model_version_by_alias(name, alias).version}"
    except MlflowException as error:
        raise ValueError(f"models:/{name}@{alias}: cannot be served: {reason_of(error)}") from None


def server(model: mlflow.pyfunc.PyFuncModel, name: str) -> FastAPI:
    """Return MLflow's scoring server for a model, with the pages of `with_pages`; `name` is the model's URI."""
    return with_pages(scoring_server.init(_Strict(model)), lambda: {"model": name})


def with_pages(app: FastAPI, state: Callable[[], Mapping[str, Any]]) -> FastAPI:
    """Add `GET /`, `GET /model` and `GET /metrics`, and the header `pixelclip-model` to answers without it.

    Args:
        app: server with `POST /invocations`.
        state: returns what `GET /model` answers: `model`, and as in `Rollout.state` what became of newer versions.
    """
    requests: Counter[int] = Counter()
    seconds = 0.0

    @app.middleware("http")
    async def count(request: Request, call_next: Any) -> Response:
        nonlocal seconds
        start = time.perf_counter()
        response: Response = await call_next(request)
        if request.url.path == "/invocations":
            requests[response.status_code] += 1
            seconds += time.perf_counter() - start
            response.headers.setdefault(MODEL_HEADER, state()["model"])
        return response

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        now = state()
        rejected = now.get("rejected") or {}
        note = f"<p>{escape(rejected['model'])} was rejected: {escape(rejected['reason'])}</p>" if rejected else ""
        return _PAGE.format(model=escape(now["model"]), rejected=note)

    @app.get("/model")
    async def model() -> Mapping[str, Any]:
        return state()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        return _metrics(requests, seconds, state())

    return app


class _Strict:
    """A model that rejects unknown params, which MLflow would ignore."""

    def __init__(self, model: mlflow.pyfunc.PyFuncModel) -> None:
        self.model, self.metadata = model, model.metadata

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        known = [param.name for param in self.metadata.get_params_schema()]
        for name in params or {}:
            if name not in known:
                hint = nearest(name, known) or f"; the params are {', '.join(known)}"
                raise MlflowException.invalid_parameter_value(f"unknown param {name!r}{hint}")
        return self.model.predict(data, params=params)


def _metrics(requests: Counter[int], seconds: float, state: Mapping[str, Any]) -> str:
    """Format counters in Prometheus's text format."""
    rollouts = state.get("rollouts", {})
    lines = [
        "# HELP pixelclip_requests_total Requests to /invocations by HTTP status.",
        "# TYPE pixelclip_requests_total counter",
        *(f'pixelclip_requests_total{{status="{status}"}} {count}' for status, count in sorted(requests.items())),
        "# HELP pixelclip_request_seconds Duration of requests to /invocations.",
        "# TYPE pixelclip_request_seconds summary",
        f"pixelclip_request_seconds_sum {seconds:.6f}",
        f"pixelclip_request_seconds_count {requests.total()}",
        "# HELP pixelclip_model_info The model that answers.",
        "# TYPE pixelclip_model_info gauge",
        f'pixelclip_model_info{{model="{state["model"]}"}} 1',
        "# HELP pixelclip_rollouts_total Versions that were served or rejected since the start.",
        "# TYPE pixelclip_rollouts_total counter",
        *(f'pixelclip_rollouts_total{{result="{result}"}} {count}' for result, count in rollouts.items()),
    ]
    return "\n".join(lines) + "\n"


def manifest(model: str, image: str = "", tracking_uri: str = "", follow: int = 0) -> str:
    """Return a KServe `InferenceService` that serves a registered model, as YAML.

    Args:
        model: `models:/NAME@ALIAS` or `models:/NAME/VERSION`, read when a pod starts.
        image: container image; by default PIXELCLIP_IMAGE.
        tracking_uri: MLflow's address inside the cluster; by default MLFLOW_TRACKING_URI.
        follow: seconds between two looks at the alias, whose new versions each pod then serves; 0: never.

    Raises:
        ValueError: another kind of model, no image or address is given, or `follow` without an alias.
    """
    match = _URI.fullmatch(model)
    if match is None:
        raise ValueError(f"{model}: must be models:/NAME@ALIAS or models:/NAME/VERSION")
    if follow:
        alias_of(model)
    image, tracking_uri = image or os.environ.get(IMAGE, ""), tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not image:
        raise ValueError(f"the container image is missing: set --image or {IMAGE}")
    if not tracking_uri.startswith(("http://", "https://")):
        raise ValueError(f"--tracking-uri or MLFLOW_TRACKING_URI must be http(s)://..., found {tracking_uri!r}")
    if tracking_uri != public_url(tracking_uri):
        raise ValueError(
            "the tracking URI contains a password or token, which a manifest would show; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD from a Secret in the manifest instead"
        )
    # A DNS label that starts with a letter; KServe appends `-predictor`.
    name = re.sub(r"[^a-z0-9]+", "-", match["name"].lower()).strip("-")[:40].strip("-")
    name = name if name[:1].isalpha() else f"model-{name}".rstrip("-")
    following = ["--follow", str(follow)] if follow else []
    container = {
        "name": "kserve-container",
        "image": image,
        "command": ["pixelclip", "serve", "run", model, "--host", "0.0.0.0", "--port", str(_PORT), *following],
        "env": [{"name": "MLFLOW_TRACKING_URI", "value": tracking_uri}],
        "ports": [{"containerPort": _PORT, "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/ping", "port": _PORT}, "periodSeconds": 5},
        "resources": {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True},
    }
    scrape = {"prometheus.io/scrape": "true", "prometheus.io/port": str(_PORT), "prometheus.io/path": "/metrics"}
    document = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {"predictor": {"minReplicas": 1, "timeout": 60, "annotations": scrape, "containers": [container]}},
    }
    return yaml.safe_dump(document, sort_keys=False)
