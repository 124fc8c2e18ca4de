"""STAGE fetch_data: fetch data of one git revision from a DVC or git repository.

The revision is resolved to a commit first, which identifies the data later. Files come from the DVC remote (or the
local cache of a repository on this machine) and are checked against the MD5 in the commit. Credentials come from the
environment (AWS_*) and from git.
"""

import logging
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pixelclip.config import FetchDataConfig
from pixelclip.storage.files import digest, file_md5, read_json
from pixelclip.storage.progress import track
from pixelclip.storage.urls import public_url, scrubbed
from pixelclip.workflow.stage import METRICS, PROVENANCE, Metrics, Stage, describe

_AT_ONCE = 16


def look_at_remote(repo: str) -> str:
    """Check that the DVC remote of a repository can be read; return its address, empty if there is no remote.

    Raises:
        ValueError: the repository does not exist, or the remote rejects access or cannot be reached.
    """
    public = public_url(repo)
    with _opened(repo, public, "HEAD") as (files, _):
        try:
            remote = files.repo.cloud.get_remote()
        except Exception as error:  # a missing section, an unknown name, a missing plug-in
            if type(error).__name__ == "NoRemoteError":
                return ""
            raise ValueError(f"{public}: {_reason(error)}") from None
        if remote.name == "auto-generated-upstream":  # DVC's name for the cache of a repository on this machine
            return ""
        is_s3 = remote.fs.protocol == "s3"
        refused = _refusal(files) if is_s3 or remote.fs.exists(remote.path) else f": {public_url(remote.path)} does not exist"
        if refused:
            raise ValueError(f"{public}: the DVC remote cannot be read{refused}")
        return f"{'s3://' if is_s3 else ''}{public_url(remote.path)}"


def run(repo: str, out: Path, config: FetchDataConfig) -> Metrics:
    """Fetch a folder or file of a DVC or git repository at one revision.

    Args:
        repo: git repository with DVC data: a folder or a URL.
        out: output folder of the data; the `source` in its provenance is `repo` and the values of `about`.
        config: settings.

    Returns:
        `files` and `bytes`.

    Raises:
        ValueError: repository, revision or path do not exist, the remote rejects access or cannot be reached, or a file
            is missing from it or damaged.
    """
    repo = repo if "://" in repo or not Path(repo).is_dir() else str(Path(repo).absolute())
    public = public_url(repo)
    with _opened(repo, public, config.revision) as (files, git_sha):
        stage = Stage("fetch_data", out, {}, config, source={"repo": public, "git_sha": git_sha})
        if stage.finished:
            return stage.reuse()
        where = f"{public}: {config.path} at {git_sha[:12]}"
        with stage:
            try:
                stage.source |= {"path": config.path, **_fetch(files, config.path, where, stage.folder)}
            except ValueError:
                raise
            except Exception as error:  # of botocore, aiohttp, fsspec and DVC
                reason = _refusal(files) or f": {_reason(error)}"
                raise ValueError(f"{where}: the DVC remote cannot be read{reason}") from None
            _free_names(where, stage)
            metrics = {"files": float(stage.source["nfiles"]), "bytes": float(stage.source["size"])}
            return stage.finish(metrics, files=["**/*"])


def commit_of(repo: str, revision: str) -> str:
    """Return the full SHA of the commit to which a branch, tag or commit currently points.

    Raises:
        ValueError: repository or revision do not exist, or the repository cannot be reached.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    public = public_url(repo)
    with _opened(repo, public, revision) as (_, git_sha):
        print(f"{public}: {revision} is {git_sha}", flush=True)
        return git_sha


def look_inside(repo: str, revision: str, paths: Iterable[str], file: str = "") -> tuple[str, str]:
    """Check that paths exist in one revision of a repository, without fetching them.

    Args:
        repo: git repository with DVC data.
        revision: branch, tag or commit.
        paths: folders or files in the repository.
        file: a small text file in the repository to read, or empty.

    Returns:
        The full SHA of the commit, and the content of `file`.

    Raises:
        ValueError: repository, revision, a path or the file do not exist, or the file is no text.
    """
    public = public_url(repo)
    with _opened(repo, public, revision) as (files, git_sha):
        for path in [*paths, *([file] if file else [])]:
            if not files.exists(path):
                raise ValueError(f"{public}: {path} at {git_sha[:12]}: there is no such path{_siblings(files, path)}")
        try:
            return git_sha, files.read_text(file) if file else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{public}: {file} at {git_sha[:12]}: cannot be read as text ({_reason(error)})") from None


class _Fetched(BaseModel):
    source: dict[str, Any]


def about(out: Path) -> dict[str, Any]:
    """Return `git_sha`, `path`, `md5` (DVC's if it tracks the path), `nfiles` and `size` of an output of this stage."""
    return {name: value for name, value in read_json(out / PROVENANCE, _Fetched)["source"].items() if name != "repo"}


@contextmanager
def _opened(repo: str, public: str, revision: str) -> Iterator[tuple[Any, str]]:
    """Open the repository as a file system; yield it and the commit of `revision`."""
    try:
        import pygit2
        from dvc.api import DVCFileSystem
        from dvc.repo.open_repo import clean_repos
        from dvc.scm import CloneError, RevError, SCMError
    except ImportError:
        raise ValueError(f"{public}: DVC is not installed; run pip install 'pixelclip[data]'") from None
    for name in ("scmrepo", "dvc", "dvc_data"):  # they log every exception with its traceback
        logging.getLogger(name).setLevel(logging.CRITICAL)
    files = None
    # A folder mounted into a container has another owner. Git rejects such folders because of the programs that a repository's
    # configuration may run; libgit2 runs none.
    pygit2.settings.owner_validation = False
    try:
        files = DVCFileSystem(repo, rev=revision, subrepos=True)
        yield files, files.repo.get_rev()
    except RevError:
        raise ValueError(f"{public}: there is no revision {revision!r} (fetch_data.revision)") from None
    except (CloneError, SCMError) as error:
        raise ValueError(f"{public}: not a readable git repository ({scrubbed(_reason(error), repo)})") from None
    finally:
        pygit2.settings.owner_validation = True
        if files is not None:
            files.close()
        clean_repos()  # otherwise clones stay in /tmp and a later call searches an outdated one


def _fetch(files: Any, path: str, where: str, folder: Path) -> dict[str, Any]:
    """Fetch all files below `path`; return `md5`, `nfiles` and `size`, DVC's values if it has them."""
    for name in (PROVENANCE, METRICS):  # of a run that was killed while it finished
        (folder / name).unlink(missing_ok=True)
    try:
        top = files.info(path)
    except FileNotFoundError:
        raise ValueError(f"{where}: there is no such path (fetch_data.path){_siblings(files, path)}") from None
    is_folder = top["type"] == "directory"
    infos = files.find(path, detail=True) if is_folder else {path: top}
    if not infos:
        raise ValueError(f"{where}: contains no file")
    store = _DefaultRemote(files)
    start = posixpath.join("/", path if is_folder else posixpath.dirname(path))

    def fetch(name: str) -> Path:
        target = folder / posixpath.relpath(posixpath.join("/", name), start)
        expected = infos[name].get("dvc_info", {}).get("md5")  # not DVC 2's "md5-dos2unix", the hash of normalised line ends
        if expected and target.is_file() and file_md5(target) == expected:  # of an interrupted run
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        if expected and store.fetched(expected, target):
            return target
        try:
            files.get_file(name, str(target), info=dict(infos[name]))
        except FileNotFoundError as error:
            message = f"{name} is missing from the DVC remote ({_reason(error)})"
            raise ValueError(f"{where}: {message}{_refusal(files)}") from None
        if expected and (md5 := file_md5(target)) != expected:
            raise ValueError(f"{where}: {name} is damaged in the DVC remote (MD5 mismatch: expected {expected}, got {md5})")
        return target

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            targets = list(track(pool.map(fetch, infos), "fetch_data", "file", len(infos)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    actual = digest(folder if is_folder else targets[0])
    values = {"md5": actual["md5"], "nfiles": actual["num_files"], "size": actual["size"]}
    tracked = top.get("dvc_info", {})
    if md5 := tracked.get("md5") or tracked.get("md5-dos2unix"):
        meta = tracked["entry"].meta
        values |= {"md5": md5, "nfiles": meta.nfiles or values["nfiles"], "size": meta.size or values["size"]}
    return values


class _DefaultRemote:
    """The repository's default remote, if it is not on this machine: one request per file, where DVC sends two.

    DVC first asks every storage whether it has a file. The MD5 shows that a file is the right one. After anything unexpected
    (another remote, cloud versioning, no access) this class does nothing, and DVC fetches the files or explains why not.
    """

    def __init__(self, files: Any) -> None:
        self._objects = None
        with suppress(Exception):  # no remote, or DVC's settings of it are invalid
            objects = files.repo.cloud.get_remote().odb
            self._objects = objects if objects.fs.protocol not in ("local", "file") else None

    def fetched(self, md5: str, target: Path) -> bool:
        """Return whether `target` is now the file with this MD5."""
        objects = self._objects
        if objects is None:
            return False
        try:
            objects.fs.get_file(objects.oid_to_path(md5), str(target))
            if file_md5(target) == md5:
                return True
        except Exception:  # of botocore, aiohttp, fsspec and DVC
            pass
        self._objects = None
        return False


def _siblings(files: Any, path: str) -> str:
    parent = posixpath.dirname(path.rstrip("/")) or "/"
    try:
        names = sorted(posixpath.basename(name) for name in files.ls(parent, detail=False))
    except OSError:
        return ""
    shown = [name for name in names if not name.startswith(".")][:10]
    return f"; {'the repository' if parent == '/' else parent} contains {', '.join(shown)}" if shown else ""


def _free_names(where: str, stage: Stage) -> None:
    """Remove provenance and metrics of a fetched stage output; keep its provenance as that of the input `made`."""
    taken = [name for name in (PROVENANCE, METRICS) if (stage.folder / name).exists()]
    if PROVENANCE in taken and "provenance" in (made := describe(stage.folder)):
        stage.inputs["made"] = made | {"path": stage.source["repo"]}
    elif taken:
        raise ValueError(f"{where}: contains {taken[0]}, a file name that pixelclip reserves; rename the file")
    for name in taken:
        (stage.folder / name).unlink()


def _refusal(files: Any) -> str:
    """Return why an S3 remote rejects access: DVC sends HEAD, whose reply gives no reason, so request a listing."""
    try:
        remote = files.repo.cloud.get_remote()
        if remote.fs.protocol != "s3":
            return ""
        bucket = remote.path.split("/")[0]
        endpoint = public_url(remote.fs.fs.client_kwargs.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL") or "AWS")
        where = f"s3://{bucket} at {endpoint}"
        remote.fs.fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
        remote.fs.fs.call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError:
        return f": there is no such bucket: {where}"
    except Exception as error:  # of botocore, aiohttp, fsspec and DVC
        keys = type(error).__name__ in ("PermissionError", "NoCredentialsError", "PartialCredentialsError")
        hint = "; see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if keys else ""
        return f": {where}: {_reason(error)}{hint}"
    return ""


def _reason(error: BaseException) -> str:
    """Return the innermost cause of an exception in one line."""
    seen = {id(error)}
    while (inner := error.__cause__ or error.__context__) is not None and id(inner) not in seen:
        seen.add(id(inner))
        error = inner
    return scrubbed(" ".join(str(error).split())) or type(error).__name__
