"""Doctor: looks at everything that a run needs, one line each, and says what to do.

What is configured (by the environment or an option) and does not work has failed. What is not configured is said to be so
and is no failure. Nothing is written anywhere.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pixelclip.cache import root as cache_folder
from pixelclip.fetch_data import look_at_remote, without_login
from pixelclip.s3 import REASONS

SECONDS = 20.0
"""What one check may take."""
_GIB = 1 << 30
_SHARED, _DISK = 1 * _GIB, 10 * _GIB
_MANIFESTS = (
    "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
)
_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do."""

    what: str
    state: Literal["ok", "missing", "failed", "not configured"]
    said: str
    advice: str = ""


def run(s3: str = "", data: str = "", kfp: str = "", image: str = "", seconds: float = SECONDS) -> list[Finding]:
    """Looks at everything, side by side.

    Args:
        s3: `s3://bucket` or `s3://bucket/prefix` to read; empty: all buckets of the endpoint, if one is configured.
        data: git repository whose DVC remote is looked at; empty: the present folder, if it has one.
        kfp: URL of Kubeflow Pipelines; empty: KFP_ENDPOINT or KF_PIPELINES_ENDPOINT.
        image: container image that a cluster shall pull; empty: PIXELCLIP_IMAGE.
        seconds: what one check may take.

    Returns:
        The findings, in the order in which they are printed.
    """
    kfp = kfp or os.environ.get("KFP_ENDPOINT") or os.environ.get("KF_PIPELINES_ENDPOINT") or ""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("GPU", gpu),
        ("shared memory", shared_memory),
        ("disk", disk),
        ("S3", lambda: storage(s3, seconds)),
        ("MLflow", lambda: mlflow(seconds)),
        ("DVC remote", lambda: dvc_remote(data)),
        ("KFP", lambda: pipelines(kfp, seconds)),
        ("image", lambda: container_image(image or os.environ.get("PIXELCLIP_IMAGE", ""), seconds)),
    ]
    findings: dict[str, Finding] = {}

    def look(what: str, check: Callable[[], Finding]) -> None:
        try:
            findings[what] = check()
        except Exception as error:  # a check that breaks is a finding, and must not hide the others
            findings[what] = Finding(what, "failed", f"{type(error).__name__}: {_line(error)}")

    threads = [threading.Thread(target=look, args=check, daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    late = [Finding(what, "failed", f"no answer within {seconds:g} s") for what, _ in checks]
    for thread in threads:
        thread.join(seconds)
    return [findings.get(finding.what, finding) for finding in late]


def as_text(findings: Sequence[Finding]) -> str:
    """One line each."""
    width = max(len(finding.what) for finding in findings)
    return "\n".join(
        f"{finding.what:<{width}}  {finding.state:<14}  {finding.said}{f'; {finding.advice}' if finding.advice else ''}"
        for finding in findings
    )


def as_json(findings: Sequence[Finding]) -> str:
    """The same for programs: a list of `what`, `state`, `said`, `advice`."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def gpu() -> Finding:
    """Driver and devices, and whether torch can use them."""
    import torch

    driver = ""
    if program := shutil.which("nvidia-smi"):
        words = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found = subprocess.run(words, capture_output=True, text=True, timeout=15)
        if found.returncode:
            return Finding("GPU", "failed", f"nvidia-smi: {_line(found.stdout or found.stderr)}", "look at the driver")
        driver = "; ".join(found.stdout.strip().splitlines())
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding("GPU", "ok", f"{driver or names}; torch {torch.__version__} computes on {torch.cuda.device_count()}")
    if driver:
        advice = f"torch {torch.__version__} is made for CUDA {torch.version.cuda}; the driver must be as new"
        return Finding("GPU", "failed", f"{driver}, but torch cannot use it", advice)
    return Finding("GPU", "missing", "no NVIDIA driver; training runs on the CPU", "in a pod, ask for nvidia.com/gpu")


def shared_memory() -> Finding:
    """Data loaders pass batches through /dev/shm."""
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        return Finding("shared memory", "failed", f"/dev/shm: {_line(error)}", "mount a tmpfs there, or set train.workers=0")
    if size < _SHARED:
        advice = "docker run --shm-size=8g, in a pod a memory volume at /dev/shm, or set train.workers=0"
        return Finding("shared memory", "failed", f"/dev/shm has {size / _GIB:.2f} GiB, data loaders need 1 or more", advice)
    return Finding("shared memory", "ok", f"/dev/shm has {size / _GIB:.1f} GiB")


def disk() -> Finding:
    """Room where runs and downloads go."""
    said, low = [], False
    for name, path in (("here", Path.cwd()), ("downloads", cache_folder())):
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        low = low or free < _DISK
        writable = os.access(there, os.W_OK)
        said.append(f"{free / _GIB:.0f} GiB free in {path}{'' if writable else ', which cannot be written'} ({name})")
        if not writable:
            return Finding("disk", "failed", ", ".join(said), "give another --out, or another PIXELCLIP_CACHE")
    advice = "10 GiB or more are wanted; PIXELCLIP_CACHE names another folder for downloads"
    return Finding("disk", "failed" if low else "ok", ", ".join(said), advice if low else "")


def storage(uri: str, seconds: float = SECONDS) -> Finding:
    """The S3 endpoint, its keys, and a bucket."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not (uri or endpoint or os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_PROFILE")):
        return Finding("S3", "not configured", "no AWS_ENDPOINT_URL and no keys", "not needed for local files")
    try:
        import boto3.session
        from botocore import exceptions as boto
        from botocore.config import Config
    except ImportError:
        return Finding("S3", "failed", "boto3 is missing", "pip install 'pixelclip[s3]'")
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    config = Config(connect_timeout=seconds / 3, read_timeout=seconds / 2, retries={"total_max_attempts": 1})
    where = f"{endpoint or 'AWS'}{f', bucket {bucket}' if bucket else ''}"
    try:
        client = boto3.session.Session().client("s3", config=config)
        if not bucket:
            there = sorted(entry["Name"] for entry in client.list_buckets()["Buckets"])
            return Finding("S3", "ok", f"{where}: keys accepted, {len(there)} buckets: {', '.join(there[:5])}")
        listed = client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        client.head_bucket(Bucket=bucket)  # some servers list a bucket that is not there as empty
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        return Finding("S3", "failed", f"{where}: {_line(error)}", _KEYS)
    except boto.ClientError as error:
        code = error.response["Error"].get("Code", "")
        code = "NoSuchBucket" if code == "404" else code  # HEAD is answered with a bare number
        advice = "make the bucket, or name another" if code == "NoSuchBucket" else _KEYS
        return Finding("S3", "failed", f"{where}: {REASONS.get(code, _line(error))} ({code})", advice)
    except (boto.BotoCoreError, ValueError) as error:
        return Finding("S3", "failed", f"{where}: {_line(error)}", "look at AWS_ENDPOINT_URL, and at the network")
    if prefix and not listed.get("KeyCount"):
        return Finding("S3", "failed", f"{where}: nothing below {prefix}", "look at the prefix")
    return Finding("S3", "ok", f"{where}: keys accepted, the bucket can be listed")


def mlflow(seconds: float = SECONDS) -> Finding:
    """The tracking server and its registry."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return Finding(
            "MLflow", "not configured", "runs go to sqlite:///runs/mlflow.db", "set MLFLOW_TRACKING_URI for a server"
        )
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, int(seconds / 2))))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    try:
        from pixelclip.server import connect
    except ImportError as error:
        return Finding("MLflow", "failed", f"{error.name} is missing", "pip install 'pixelclip[train]'")
    shown = without_login(uri)
    try:
        models = connect().search_registered_models(max_results=100)
    except Exception as error:  # as in connect
        advice = "look at MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return Finding(
            "MLflow", "failed", _line(error).replace(uri, shown), f"{advice}; status 403: --allowed-hosts of the server"
        )
    version = ""
    if uri.startswith("http"):
        _, _, body = _ask(f"{uri.rstrip('/')}/version", seconds / 2)
        version = f" {body.decode(errors='replace')[:20]}" if re.fullmatch(rb"[\w.]+", body) else ""
    return Finding("MLflow", "ok", f"{shown}: server{version} answers, its registry holds {len(models)} models")


def dvc_remote(repo: str) -> Finding:
    """The DVC remote of a repository: there, and ours to read."""
    if not repo and not Path(".dvc", "config").is_file():
        return Finding("DVC remote", "not configured", "this folder is no DVC repository", "name one with --data")
    try:
        where = look_at_remote(repo or ".")
    except ValueError as error:
        return Finding("DVC remote", "failed", _line(error), "dvc remote modify NAME endpointurl URL; keys come from AWS_*")
    if not where:
        return Finding(
            "DVC remote", "not configured", f"{repo or 'this folder'} names no remote", "dvc remote add -d NAME s3://..."
        )
    return Finding("DVC remote", "ok", f"{where} can be read")


def pipelines(endpoint: str, seconds: float = SECONDS) -> Finding:
    """Kubeflow Pipelines: whether it is healthy, and its version against the SDK's."""
    if not endpoint:
        return Finding("KFP", "not configured", "no KFP_ENDPOINT", "set it to submit to a cluster")
    token = os.environ.get("KFP_TOKEN", "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{endpoint.rstrip('/')}/apis/v2beta1/healthz"
    try:
        status, _, body = _ask(url, seconds / 2, headers)
    except OSError as error:
        return Finding(
            "KFP", "failed", f"{endpoint}: {_line(error)}", "look at KFP_ENDPOINT; kubectl port-forward svc/ml-pipeline-ui"
        )
    if status in (401, 403) or (status == 200 and not body.lstrip().startswith(b"{")):
        return Finding("KFP", "failed", f"{endpoint}: asks for a login (status {status})", "set KFP_TOKEN")
    if status != 200:
        return Finding("KFP", "failed", f"{url}: status {status}", "KFP_ENDPOINT must be the address of KFP 2's UI or API")
    version = str(json.loads(body).get("tag_name", ""))
    sdk = metadata.version("kfp")
    said = f"{endpoint}: KFP {version or 'of unknown version'}, SDK {sdk}"
    if version and version.split(".")[0] != sdk.split(".")[0]:
        return Finding("KFP", "failed", said, "both must be of one major version")
    return Finding("KFP", "ok", said)


def container_image(image: str, seconds: float = SECONDS) -> Finding:
    """Whether the registry has the image, and by which digest."""
    if not image:
        return Finding("image", "not configured", "no PIXELCLIP_IMAGE", "needed for --runner docker and for a cluster")
    found = re.fullmatch(r"(?:([^/]+[.:][^/]*|localhost)/)?([a-z0-9._/-]+?)(?::([\w.-]+))?(?:@(sha256:[0-9a-f]{64}))?", image)
    if not found:
        return Finding("image", "failed", f"{image!r} is no name of an image", "HOST/NAME:TAG or HOST/NAME@sha256:DIGEST")
    host, name, tag, digest = found.groups()
    local = _local_image(image)
    if host is None and local:
        return Finding("image", "ok", f"{image} is in the local engine ({local}); a cluster needs it in a registry")
    try:
        status, there = _manifest(host, name, digest or tag or "latest", seconds)
    except OSError as error:
        if local:
            return Finding("image", "ok", f"{image} is in the local engine ({local}); its registry: {_line(error)}")
        return Finding("image", "failed", f"{image}: {_line(error)}", "look at the registry's name, and at the network")
    if status in (401, 403):
        return Finding(
            "image", "failed", f"{image}: the registry refuses (status {status})", f"docker login {host or ''}".strip()
        )
    if status != 200:
        return Finding("image", "failed", f"{image}: the registry does not have it (status {status})", "push it: make image")
    return Finding(
        "image", "ok", f"{image} can be pulled", "" if digest else f"a tag can move: {(host or 'docker.io')}/{name}@{there}"
    )


def _local_image(image: str) -> str:
    program = shutil.which("docker")
    if program is None:
        return ""
    found = subprocess.run([program, "image", "inspect", "-f", "{{.Id}}", image], capture_output=True, text=True, timeout=15)
    return found.stdout.strip()[:19] if found.returncode == 0 else ""


def _manifest(host: str | None, name: str, reference: str, seconds: float) -> tuple[int, str]:
    """Asks a registry for a manifest, anonymously or with docker's login; returns status and digest."""
    server = "registry-1.docker.io" if host in (None, "docker.io") else host
    name = f"library/{name}" if host in (None, "docker.io") and "/" not in name else name
    scheme = "http" if re.match(r"(localhost|127\.)", str(server)) else "https"
    url = f"{scheme}://{server}/v2/{name}/manifests/{reference}"
    login = _login(host or "https://index.docker.io/v1/")
    status, headers, _ = _ask(url, seconds / 4, {"Accept": _MANIFESTS} | login, "HEAD")
    asked = dict(re.findall(r'(\w+)="([^"]*)"', headers.get("www-authenticate", "")))
    if status == 401 and asked.get("realm"):
        query = urllib.parse.urlencode({key: asked[key] for key in ("service", "scope") if key in asked})
        _, _, body = _ask(f"{asked['realm']}?{query}", seconds / 4, login)
        answer = json.loads(body or b"{}")
        token = answer.get("token") or answer.get("access_token")
        if token:
            bearer = {"Accept": _MANIFESTS, "Authorization": f"Bearer {token}"}
            status, headers, _ = _ask(url, seconds / 4, bearer, "HEAD")
    return status, headers.get("docker-content-digest", "")


def _login(host: str) -> dict[str, str]:
    try:
        path = Path(os.environ.get("DOCKER_CONFIG", "~/.docker")).expanduser() / "config.json"
        auth = json.loads(path.read_bytes())["auths"][host]["auth"]
        base64.b64decode(auth, validate=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError):
        return {}
    return {"Authorization": f"Basic {auth}"}


def _ask(url: str, seconds: float, headers: dict[str, str] | None = None, method: str = "GET") -> tuple[int, Any, bytes]:
    try:
        request = urllib.request.Request(url, headers=headers or {}, method=method)
        with urllib.request.urlopen(request, timeout=seconds) as reply:
            return reply.status, {key.lower(): value for key, value in reply.headers.items()}, reply.read(1 << 20)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {key.lower(): value for key, value in error.headers.items()}, b""
    except ValueError as error:
        raise OSError(f"{url}: {error}") from None


def _line(error: object) -> str:
    return " ".join(str(getattr(error, "reason", error)).split())[:300] or type(error).__name__
