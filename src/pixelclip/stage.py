"""A Stage: one atomic, resumable step from folders to a folder, with its provenance.

Work happens in a hidden sibling of the output that is named by the stage's fingerprint and renamed when all is done. A
stage killed at any moment therefore leaves either nothing or work that the same command continues.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel

from pixelclip import __version__
from pixelclip.cache import origin
from pixelclip.config import lasting
from pixelclip.storage import digest, files_below, read_json, write_json

Metrics = dict[str, float]
PROVENANCE = "provenance.json"
METRICS = "metrics.json"
UNKNOWN, CHANGED = "unknown", "+changes"
"""A revision of code that nobody knows, and the end of one whose files differ from their commit."""


class Stage:
    """One run of a stage.

    Args:
        name: the stage.
        out: the folder that it makes.
        inputs: what it reads, as `describe` says it.
        config: its settings.
        source: of a stage that fetches: from which `repo`, at which commit `git_sha`; more may be added before `finish`.

    Raises:
        ValueError: `out` already holds something else.
    """

    def __init__(
        self,
        name: str,
        out: Path,
        inputs: Mapping[str, dict[str, Any]],
        config: BaseModel,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.out = out.absolute()
        self.settings = lasting(config)
        self.inputs = dict(inputs)
        self.source = dict(source or {})
        identity = [name, __version__, self.settings, {key: value["md5"] for key, value in self.inputs.items()}]
        identity += [self.source["git_sha"]] if self.source else []
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = self.out.with_name(f".{self.out.name}.{self.fingerprint[:12]}.partial")
        self._lock: int | None = None
        self._check_out()

    @property
    def finished(self) -> bool:
        """Whether `out` already holds the result of these inputs and settings."""
        return (self.out / PROVENANCE).is_file()

    def reuse(self) -> Metrics:
        """Says that the finished result is reused, and returns its metrics."""
        print(f"{self.name}: reused {_short(self.out)} (same inputs and settings)", flush=True)
        return dict(read_json(self.out / METRICS))

    def __enter__(self) -> Self:
        resumed = self.folder.is_dir()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.out}: cannot be made: {error.strerror}") from None
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise ValueError(f"{self.out}: another process is making this right now") from None
        siblings = self._siblings()
        if busy := [folder for folder in siblings if _is_locked(folder)]:
            if not resumed:
                self.folder.rmdir()
            self.__exit__(None, None, None)
            raise ValueError(
                f"{self.out}: another process is making this with other inputs or settings right now ({_short(busy[0])}); "
                "wait for it, or give another folder"
            )
        print(f"{self.name}: {'continues an interrupted run' if resumed else 'starts'} → {_short(self.out)}", flush=True)
        if not resumed and siblings:
            names = ", ".join(_short(folder) for folder in siblings)
            print(f"{self.name}: other inputs or settings left unfinished work, which may be removed: {names}", flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.filename = str(self.folder)  # a write does not know its file; people need to know which disk is full
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def finish(self, metrics: Metrics, files: Sequence[str]) -> Metrics:
        """Completes the folder and moves it to `out`.

        Args:
            metrics: flat finite numbers.
            files: glob patterns of the files that identify the result, as the next stage sees it.

        Returns:
            `metrics`.
        """
        chosen = [path for path in files_below(self.folder) if any(path.match(pattern) for pattern in files)]
        write_json(self.folder / METRICS, metrics)
        write_json(
            self.folder / PROVENANCE,
            {
                **self.provenance(),
                **({"source": self.source} if self.source else {}),
                "output": digest(self.folder, chosen),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )
        try:
            self.folder.replace(self.out)  # onto nothing or an empty folder, see _check_out
        except OSError as error:
            raise ValueError(
                f"{self.out}: cannot be put there any more ({error.strerror}); "
                f"the finished result stands in {self.folder}: move that folder to where you want it"
            ) from None
        return metrics

    def provenance(self) -> dict[str, Any]:
        """What is being made, from what, and by which code in which image."""
        image = code_image()
        return {
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "inputs": self.inputs,
            "version": __version__,
            "revision": code_revision(),
        } | ({"image": image} if image else {})

    def _siblings(self) -> list[Path]:
        """Unfinished work for `out` by other fingerprints."""
        name = re.compile(rf"\.{re.escape(self.out.name)}\.[0-9a-f]{{12}}\.partial")
        return sorted(path for path in self.out.parent.iterdir() if name.fullmatch(path.name) and path != self.folder)

    def _check_out(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise ValueError(f"{self.out}: must be a folder, found a file")
        if not any(self.out.iterdir()):
            return
        if not (self.out / PROVENANCE).is_file():
            raise ValueError(f"{self.out}: holds files that no stage of pixelclip made; give an empty or a new folder")
        there = read_json(self.out / PROVENANCE)
        if there.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"{self.out}: holds a finished result of stage {there.get('stage')!r} with other inputs or settings "
                f"({self._difference(there)}); remove it or give another folder"
            )

    def _difference(self, there: dict[str, Any]) -> str:
        found = []
        if there.get("version") != __version__:
            found.append(f"version {there.get('version')} → {__version__}")
        for key, new in self.settings.items():
            old = there.get("settings", {}).get(key)
            if old != new:
                found.append(f"{self.name}.{key} {old!r} → {new!r}")
        for key, described in self.inputs.items():
            if there.get("inputs", {}).get(key, {}).get("md5") != described["md5"]:
                found.append(f"other {key}")
        if self.source and (old := there.get("source", {}).get("git_sha")) != self.source["git_sha"]:
            found.append(f"commit {old} → {self.source['git_sha']}")
        return ", ".join(found) or "another stage"


def _is_locked(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # finished or removed just now, or not ours to read: nobody can be seen at it
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def describe(path: Path) -> dict[str, Any]:
    """Identifies an input: path, md5, number of files, size and, where a stage made it, its whole provenance.

    Raises:
        ValueError: there is no such file or folder.
    """
    made_by, said = path / PROVENANCE, {"path": origin(path)}
    if made_by.is_file():
        provenance = read_json(made_by)
        if isinstance(provenance, dict) and isinstance(provenance.get("output"), dict):  # else it is somebody else's file
            return {**said, **provenance["output"], "provenance": provenance}
    return {**said, **digest(path)}


def code_revision() -> str:
    """Git revision of this code (with `CHANGED` when files differ from it), or PIXELCLIP_REVISION, or `UNKNOWN`."""
    if given := os.environ.get("PIXELCLIP_REVISION"):
        return given
    here = Path(__file__).parent
    git = shutil.which("git")
    if git is None:
        return UNKNOWN
    tracked = subprocess.run([git, "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True)
    if tracked.returncode:  # installed as a package below somebody else's repository, or below none
        return UNKNOWN
    head = subprocess.run([git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    changed = subprocess.run([git, "diff", "--quiet", "HEAD", "--", "."], cwd=here, capture_output=True)
    return head.stdout.strip() + (CHANGED if changed.returncode else "") if head.returncode == 0 else UNKNOWN


def code_image() -> str:
    """The container image that this process runs in, by tag or digest (PIXELCLIP_IMAGE); empty outside of one."""
    return os.environ.get("PIXELCLIP_IMAGE", "")


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
