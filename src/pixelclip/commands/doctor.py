"""Check the environment of a run: GPU, memory, disk, S3, MLflow, DVC, Kubeflow Pipelines and the container image.

Unconfigured services are skipped, not failed. Nothing is written.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial, wraps
from importlib import metadata
from pathlib import Path
from typing import Literal

from pixelclip.fetch_data import look_at_remote
from pixelclip.storage import cache
from pixelclip.storage.s3 import connected, split
from pixelclip.storage.urls import public_url, scrubbed

SECONDS = 20.0
"""Time limit of one check."""
_GIB = 1 << 30
_SHARED, _DISK = 1, 10  # GiB needed
State = Literal["ok", "missing", "failed", "not configured"]
_Result = tuple[State, str] | tuple[State, str, str]


@dataclass(frozen=True)
class Finding:
    """Result of one check: subject, state, details and advice."""

    what: str
    state: State
    said: str
    advice: str = ""


def _check(what: str, advice: str = "") -> Callable[[Callable[..., _Result]], Callable[..., Finding]]:
    """Turn the result of a check into a finding; an exception is a failure with `advice`."""

    def decorate(function: Callable[..., _Result]) -> Callable[..., Finding]:
        @wraps(function)
        def checked(*arguments: object) -> Finding:
            try:
                return Finding(what, *function(*arguments))
            except Exception as error:  # one check must not stop the others
                kind = "" if type(error) is ValueError or isinstance(error, OSError) else f"{type(error).__name__}: "
                return Finding(what, "failed", kind + _line(error), advice)

        return checked

    return decorate


def run(s3: str = "", data: str = "", kfp: str = "", image: str = "", seconds: float = SECONDS) -> list[Finding]:
    """Run all checks in parallel.

    Args:
        s3: `s3://bucket` or `s3://bucket/prefix` to read; by default all buckets of the endpoint, if configured.
        data: git repository whose DVC remote is checked; by default the current folder.
        kfp: URL of Kubeflow Pipelines; by default KFP_ENDPOINT or KF_PIPELINES_ENDPOINT.
        image: container image for a cluster; by default PIXELCLIP_IMAGE.
        seconds: time limit of one check.

    Returns:
        The findings in printing order.
    """
    kfp = kfp or os.environ.get("KFP_ENDPOINT") or os.environ.get("KF_PIPELINES_ENDPOINT") or ""
    checks: dict[str, Callable[[], Finding]] = {
        "GPU": gpu,
        "shared memory": shared_memory,
        "disk": disk,
        "S3": partial(storage, s3),
        "MLflow": partial(mlflow, seconds),
        "DVC remote": partial(dvc_remote, data),
        "KFP": partial(pipelines, kfp, seconds),
        "image": partial(container_image, image or os.environ.get("PIXELCLIP_IMAGE", ""), seconds),
    }
    findings = {what: Finding(what, "failed", f"no answer within {seconds:g} s") for what in checks}

    def check(what: str) -> None:
        findings[what] = checks[what]()

    threads = [threading.Thread(target=check, args=[what], daemon=True) for what in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return list(findings.values())


def as_text(findings: Sequence[Finding]) -> str:
    """Format the findings as aligned lines."""
    width = max(len(finding.what) for finding in findings)
    return "\n".join(
        f"{finding.what:<{width}}  {finding.state:<14}  {finding.said}{f'; {finding.advice}' if finding.advice else ''}"
        for finding in findings
    )


def as_json(findings: Sequence[Finding]) -> str:
    """Format the findings as a JSON list of `what`, `state`, `said`, `advice`."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)


@_check("GPU", "check the driver")
def gpu() -> _Result:
    """Check the NVIDIA driver, its devices, and torch's access to them."""
    import torch

    driver = ""
    if program := shutil.which("nvidia-smi"):
        query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=15)
        if answer.returncode:
            raise ValueError(f"nvidia-smi: {_line(answer.stdout or answer.stderr)}")
        driver = "; ".join(answer.stdout.strip().splitlines())
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = driver or ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        return "ok", f"{names}; torch {torch.__version__} computes on {count}"
    if driver:
        advice = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, which the driver must support"
        return "failed", f"{driver}, but torch cannot use it", advice
    return "missing", "no NVIDIA driver; training runs on the CPU", "in a pod, request nvidia.com/gpu"


@_check("shared memory", "docker run --shm-size=8g, in a pod a memory volume at /dev/shm, or set train.workers=0")
def shared_memory() -> _Result:
    """Check the size of /dev/shm, through which data loaders pass batches."""
    size = shutil.disk_usage("/dev/shm").total / _GIB
    if size < _SHARED:
        raise ValueError(f"/dev/shm has {size:.2f} GiB, data loaders need at least 1")
    return "ok", f"/dev/shm has {size:.1f} GiB"


@_check("disk", "choose another --out, or another folder for downloads with PIXELCLIP_CACHE")
def disk() -> _Result:
    """Check free space and permissions of the current folder and of the download cache."""
    free = {}
    for name, path in (("here", Path.cwd()), ("downloads", cache.root())):
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        if not os.access(existing, os.W_OK):
            raise ValueError(f"{path} is not writable ({name})")
        free[f"{path} ({name})"] = shutil.disk_usage(existing).free / _GIB
    details = ", ".join(f"{size:.0f} GiB free in {folder}" for folder, size in free.items())
    if min(free.values()) < _DISK:
        raise ValueError(f"{details}; at least 10 GiB are needed")
    return "ok", details


@_check("S3", "check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and at the network")
def storage(uri: str) -> _Result:
    """Check the S3 endpoint, its keys, and a bucket or prefix."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not (uri or endpoint or os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_PROFILE")):
        return "not configured", "no AWS_ENDPOINT_URL and no keys", "not needed for local files"
    name = uri or public_url(endpoint or "") or "AWS"
    with connected(name) as client:
        if not uri:
            buckets = sorted(bucket["Name"] for bucket in client.list_buckets()["Buckets"])
            return "ok", f"{name}: keys accepted, {len(buckets)} buckets: {', '.join(buckets[:5])}"
        bucket, prefix = split(uri)
        if not client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1).get("KeyCount"):
            client.head_bucket(Bucket=bucket)  # some servers list a missing bucket as an empty one
            if prefix:
                raise ValueError(f"{name}: no object below {prefix}")
    return "ok", f"{name}: keys accepted, the bucket can be listed"


@_check("MLflow", "check MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD; status 403: --allowed-hosts of the server")
def mlflow(seconds: float = SECONDS) -> _Result:
    """Check the tracking server and its registry."""
    from pixelclip.tracking.server import ADDRESSES, tracking_uri

    uri = tracking_uri()
    if not any(os.environ.get(name) for name in ADDRESSES):
        return "not configured", "runs go to sqlite:///runs/mlflow.db", "set MLFLOW_TRACKING_URI for a server"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, int(seconds / 2))))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    try:
        from pixelclip.tracking.server import connect

        models = connect().search_registered_models(max_results=100)
    except Exception as error:
        raise ValueError(_line(scrubbed(str(error), uri))) from None
    version = ""
    if uri.startswith("http"):
        import requests

        body = requests.get(f"{uri.rstrip('/')}/version", timeout=seconds / 2).text
        version = f" {body}" if re.fullmatch(r"[\w.]{1,20}", body) else ""
    return "ok", f"{public_url(uri)}: server{version} answers, its registry has {len(models)} models"


@_check("DVC remote", "dvc remote modify NAME endpointurl URL; keys come from AWS_*")
def dvc_remote(repo: str) -> _Result:
    """Check access to the DVC remote of a repository."""
    if not repo and not Path(".dvc", "config").is_file():
        return "not configured", "this folder is not a DVC repository", "choose one with --data"
    if remote := look_at_remote(repo or "."):
        return "ok", f"{remote} can be read"
    return "not configured", f"{repo or 'this folder'} has no remote", "dvc remote add -d NAME s3://..."


@_check("KFP", "check KFP_ENDPOINT, the address of KFP 2's UI or API; kubectl port-forward svc/ml-pipeline-ui")
def pipelines(endpoint: str, seconds: float = SECONDS) -> _Result:
    """Check the health of Kubeflow Pipelines, and its version against the SDK's."""
    if not endpoint:
        return "not configured", "no KFP_ENDPOINT", "set it to submit to a cluster"
    from pixelclip_pipelines.submit import health

    version, sdk = str(health(endpoint, seconds / 2).get("tag_name", "")), metadata.version("kfp")
    details = f"{public_url(endpoint)}: KFP {version or 'of unknown version'}, SDK {sdk}"
    if version and version.split(".")[0] != sdk.split(".")[0]:
        return "failed", details, "both must have the same major version"
    return "ok", details


@_check("image", "docker login, or push it: make image")
def container_image(image: str, seconds: float = SECONDS) -> _Result:
    """Look for an image in its registry and in the local engine, with docker and its login."""
    if not image:
        return "not configured", "no PIXELCLIP_IMAGE", "needed for --runner docker and for a cluster"
    program = shutil.which("docker")
    if program is None:
        return "missing", f"{image} was not checked: docker is not installed", "install docker"

    def docker(*words: str) -> str | None:
        """Return the error of a failed command, or None."""
        answer = subprocess.run([program, *words, image], capture_output=True, text=True, timeout=seconds / 2)
        return _line(answer.stderr) if answer.returncode else None

    if (reason := docker("manifest", "inspect")) is None:
        return "ok", f"{image} can be pulled", "" if "@" in image else "a tag can move: name the image by its digest"
    if docker("image", "inspect") is None:
        return "ok", f"{image} is in the local engine; its registry: {reason}", "a cluster needs it in a registry"
    raise ValueError(f"{image}: {reason}")


def _line(error: object) -> str:
    return scrubbed(" ".join(str(error).split()))[:300] or type(error).__name__
