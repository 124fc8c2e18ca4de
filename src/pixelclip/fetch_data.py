"""STAGE fetch_data: data that DVC tracks, as they were in one git revision.

The revision is resolved to a commit first, so what was fetched can be named for ever. Files come from the DVC remote (or the
local cache of a repository on this machine), each is checked against the MD5 that the commit promises, and nothing of the
repository but the data is written. Credentials come from the environment (AWS_*) and from git.
"""

import logging
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pixelclip.config import FetchDataConfig
from pixelclip.stage import METRICS, PROVENANCE, Metrics, Stage, describe
from pixelclip.storage import digest, file_md5, read_json

_AT_ONCE = 16
_TELLS = ("git_sha", "path", "md5", "nfiles", "size")


def look_at_remote(repo: str) -> str:
    """Asks the DVC remote of a repository whether it can be read.

    Args:
        repo: as for `run`; its default branch, or what is checked out, is looked at.

    Returns:
        The remote's address, or nothing where the repository names none.

    Raises:
        ValueError: there is no such repository, or the remote refuses or cannot be reached.
    """
    public = without_login(repo)
    with _opened(repo, public, "HEAD") as (files, _):
        try:
            remote = files.repo.cloud.get_remote()
        except Exception as error:  # a missing section, an unknown name, a missing plug-in
            if type(error).__name__ == "NoRemoteError":
                return ""
            raise ValueError(f"{public}: {_reason(error)}") from None
        if remote.name == "auto-generated-upstream":  # DVC's name for the cache of a repository on this machine
            return ""
        if remote.fs.protocol == "s3":
            if refused := _refusal(files):
                raise ValueError(f"{public}{refused}")
        elif not remote.fs.exists(remote.path):
            raise ValueError(f"{public}: the DVC remote {remote.path} does not exist")
        return f"{'s3://' if remote.fs.protocol == 's3' else ''}{remote.path}"


class _MissingError(Exception):
    """A file that the commit names and the remote does not hold."""


def run(repo: str, out: Path, config: FetchDataConfig) -> Metrics:
    """Fetches a folder or file of a DVC or git repository, as of one revision.

    Args:
        repo: git repository with DVC data: a folder or a URL.
        out: folder to make: the data themselves (of a file: the folder that holds it), and the provenance, whose `source`
            says `repo`, `git_sha` and what `about` returns.
        config: settings.

    Returns:
        `files` and `bytes`.

    Raises:
        ValueError: there is no such repository, revision or path, the remote cannot be reached or refuses, or a file is
            missing in it or damaged.
    """
    repo = repo if "://" in repo or not Path(repo).is_dir() else str(Path(repo).absolute())  # as it can be found again
    public = without_login(repo)
    with _opened(repo, public, config.revision) as (files, git_sha):
        stage = Stage("fetch_data", out, {}, config, source={"repo": public, "git_sha": git_sha})
        if stage.finished:
            return stage.reuse()
        where = f"{public}: {config.path} at {git_sha[:12]}"
        with stage:
            with _explained(where, files):
                stage.source |= {"path": config.path, **_fetch(files, config.path, where, stage.folder)}
            _make_way(where, stage)
            metrics = {"files": float(stage.source["nfiles"]), "bytes": float(stage.source["size"])}
            return stage.finish(metrics, files=["**/*"])


def commit_of(repo: str, revision: str) -> str:
    """The full SHA of the commit that a revision is now, so that all who are told it fetch the same data.

    Args:
        repo: as of `run`.
        revision: a branch, a tag or a commit.

    Raises:
        ValueError: there is no such repository or revision, or the remote cannot be reached.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    public = without_login(repo)
    with _opened(repo, public, revision) as (_, git_sha):
        print(f"{public}: {revision} is {git_sha}", flush=True)
        return git_sha


def about(out: Path) -> dict[str, Any]:
    """What was fetched: `git_sha`, `path`, `md5` (DVC's own where it tracks the path), `nfiles` and `size` in bytes.

    Args:
        out: what `run` made.

    Raises:
        ValueError: something else stands there.
    """
    source = read_json(out / PROVENANCE).get("source", {})
    if not source.keys() >= set(_TELLS):
        raise ValueError(f"{out}: was not made by stage fetch_data")
    return {name: source[name] for name in _TELLS}


def without_login(url: str) -> str:
    """A URL as it may be shown and kept: without user, password or token."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


def has_secret(url: str) -> bool:
    """Whether a URL holds a password or a token; the user of an ssh:// address is neither."""
    return bool(re.match(r"https?://[^/@]*@|\w+://[^/@:]*:[^/@]*@", url))


@contextmanager
def _opened(repo: str, public: str, revision: str) -> Iterator[tuple[Any, str]]:
    """The repository as a file system, and the commit that `revision` is."""
    try:
        import pygit2
        from dvc.api import DVCFileSystem
        from dvc.repo.open_repo import clean_repos
        from dvc.scm import CloneError, RevError, SCMError
    except ImportError:
        raise ValueError(f"{public}: DVC is missing; pip install 'pixelclip[data]'") from None
    for name in ("scmrepo", "dvc", "dvc_data"):  # they repeat what is raised, with a trace
        logging.getLogger(name).setLevel(logging.CRITICAL)
    files = None
    # A folder that is mounted into a container belongs to somebody else. Git's guard against that is about the programs that a
    # repository's configuration names; libgit2 runs none, and this repository was named by our user.
    pygit2.settings.owner_validation = False
    try:
        files = DVCFileSystem(repo, rev=revision, subrepos=True)
        yield files, files.repo.get_rev()
    except RevError:
        raise ValueError(f"{public}: there is no revision {revision!r} (fetch_data.revision)") from None
    except (CloneError, SCMError) as error:
        raise ValueError(f"{public}: is no git repository that can be read ({_reason(error).replace(repo, public)})") from None
    finally:
        pygit2.settings.owner_validation = True
        if files is not None:
            files.close()
        clean_repos()  # else clones stay behind in /tmp, and a later revision would be looked for in an older clone


def _fetch(files: Any, path: str, where: str, folder: Path) -> dict[str, Any]:
    """Brings all files below `path`; returns `md5`, `nfiles` and `size`, DVC's own as far as it states them for `path`."""
    for name in (PROVENANCE, METRICS):  # of a run that was killed in its last moment
        (folder / name).unlink(missing_ok=True)
    try:
        top = files.info(path)
    except FileNotFoundError:
        beside = _beside(files, path)
        raise ValueError(f"{where}: there is no such path (fetch_data.path){beside}") from None
    found = files.find(path, detail=True) if top["type"] == "directory" else {path: top}
    if not found:
        raise ValueError(f"{where}: holds no file")
    start = posixpath.join("/", path if top["type"] == "directory" else posixpath.dirname(path))
    wanted = {posixpath.relpath(posixpath.join("/", name), start): (name, info) for name, info in found.items()}

    def bring(relative: str) -> None:
        (name, info), target = wanted[relative], folder / relative
        promised = _md5(info)
        if promised and target.is_file() and file_md5(target) == promised:  # of an interrupted run
            return
        try:
            files.get_file(name, str(target), info=dict(info))
        except FileNotFoundError as error:
            raise _MissingError(f"{name} is missing in the DVC remote ({_reason(error)})") from None
        if promised and (arrived := file_md5(target)) != promised:
            raise ValueError(f"{where}: {name} is damaged in the remote (md5 {arrived}, the commit says {promised})")

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        work = [pool.submit(bring, relative) for relative in wanted]
        try:
            for done in tqdm(work, desc="fetch_data", unit="file", disable=None):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    seen = digest(folder if top["type"] == "directory" else folder / next(iter(wanted)))
    told = {"md5": seen["md5"], "nfiles": seen["num_files"], "size": seen["size"]}
    entry = top.get("dvc_info", {}).get("entry")
    if entry is not None and entry.hash_info is not None:
        stated = {"md5": entry.hash_info.value, "nfiles": entry.meta.nfiles, "size": entry.meta.size}
        told |= {key: value for key, value in stated.items() if value is not None}
    return told


def _md5(info: Mapping[str, Any]) -> str | None:
    """The MD5 that DVC promises for a file; DVC 2 changed line ends before it counted, which is no MD5 of the file."""
    entry = info.get("dvc_info", {}).get("entry")
    known = entry is not None and entry.hash_info is not None and entry.hash_info.name == "md5"
    return str(entry.hash_info.value) if known else None


def _beside(files: Any, path: str) -> str:
    parent = posixpath.dirname(path.rstrip("/")) or "/"
    try:
        names = sorted(posixpath.basename(name) for name in files.ls(parent, detail=False))
    except OSError:
        return ""
    shown = [name for name in names if not name.startswith(".")][:10]
    return f"; {'the repository' if parent == '/' else parent} holds {', '.join(shown)}" if shown else ""


def _make_way(where: str, stage: Stage) -> None:
    """Frees the two names that every stage writes; data that a stage made keep its provenance, one level deeper."""
    taken = [name for name in (PROVENANCE, METRICS) if (stage.folder / name).exists()]
    if PROVENANCE in taken and "provenance" in (made := describe(stage.folder)):
        stage.inputs["made"] = made | {"path": stage.source["repo"]}
    elif taken:
        raise ValueError(f"{where}: holds a file {taken[0]}, a name that pixelclip needs for its own; rename it")
    for name in taken:
        (stage.folder / name).unlink()


@contextmanager
def _explained(where: str, files: Any) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    except _MissingError as error:
        raise ValueError(f"{where}: {error}{_refusal(files)}") from None
    except Exception as error:  # botocore's, aiohttp's, fsspec's and DVC's own
        said = _refusal(files) or f": {_reason(error)}"
        raise ValueError(f"{where}: the DVC remote does not give it{said}") from None


def _refusal(files: Any) -> str:
    """Why an S3 remote refuses: what DVC asks with (HEAD) is answered with a bare number, so it is asked for a list."""
    try:
        remote = files.repo.cloud.get_remote()
        if remote.fs.protocol != "s3":
            return ""
        bucket = remote.path.split("/")[0]
        endpoint = remote.fs.fs.client_kwargs.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        where = f"s3://{bucket} at {endpoint}"
        remote.fs.fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
        remote.fs.fs.call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError:
        return f": there is no such bucket: {where}"
    except Exception as error:  # the same kinds as above
        keys = type(error).__name__ in ("PermissionError", "NoCredentialsError", "PartialCredentialsError")
        hint = "; see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if keys else ""
        return f": {where}: {_reason(error)}{hint}"
    return ""


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: what wraps it only says that it failed."""
    seen = {id(error)}
    while (inner := error.__cause__ or error.__context__) is not None and id(inner) not in seen:
        seen.add(id(inner))
        error = inner
    return " ".join(str(error).split()) or type(error).__name__
