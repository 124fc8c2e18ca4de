"""Run a stage: write a folder atomically, resume after an interruption, record provenance.

A stage works in a hidden sibling of its output folder, named by the stage's fingerprint, and renames it when everything is
complete. An interrupted stage therefore leaves either nothing or partial work that the same command resumes.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, FiniteFloat

from pixelclip import __version__
from pixelclip.config import lasting
from pixelclip.storage.cache import origin
from pixelclip.storage.files import digest, files_below, lock_folder, read_json, short_path, write_json
from pixelclip.storage.urls import public
from pixelclip.workflow.code_version import code_image, code_revision
from pixelclip.workflow.provenance import UNFINISHED, read_provenance
from pixelclip.workflow.termination import Terminated, terminable

Metrics = dict[str, float]
PROVENANCE = "provenance.json"
METRICS = "metrics.json"
PARTIAL = re.compile(r"\..+\.[0-9a-f]{12}\.partial")
"""Name of the hidden folder of an unfinished stage."""
_UNFINISHED = re.compile(r"\..+\.(partial|[0-9a-f]{8})")


class Stage:
    """One run of a stage.

    Args:
        name: name of the stage.
        out: output folder.
        inputs: the stage's inputs, each from `describe`.
        config: settings of the stage.
        source: for fetched data, the `repo` and commit (`git_sha`); more keys may be added before `finish`.

    Raises:
        ValueError: `out` is not empty and not a result of the same inputs and settings.
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
        # Provenance is uploaded and shown, and a new token or signature of a URL is the same setting.
        self.settings = public(lasting(config))
        self.inputs = public(dict(inputs))
        self.source = public(dict(source or {}))
        self._md5s = {key: value["md5"] for key, value in self.inputs.items()}
        # Only the same version resumes partial work. A finished result is compared without the version, see _difference.
        identity = [name, __version__, self.settings, self._md5s]
        identity += [self.source["git_sha"]] if self.source else []
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = self.out.with_name(f".{self.out.name}.{self.fingerprint[:12]}.partial")
        self._signals = ExitStack()
        self._check_out()

    @property
    def finished(self) -> bool:
        """Whether `out` already contains the result of these inputs and settings."""
        return (self.out / PROVENANCE).is_file()

    def reuse(self) -> Metrics:
        """Return the metrics of the finished result; print that it is reused, and the code that wrote it."""
        recorded = read_provenance(self.out / PROVENANCE)
        written_by, current = _code(recorded), _code({"version": __version__, "revision": code_revision()})
        reason = "same inputs and settings" if written_by == current else f"written by {written_by}; this is {current}"
        print(f"{self.name}: reused {short_path(self.out)} ({reason})", flush=True)
        return read_metrics(self.out)

    def __enter__(self) -> Self:
        siblings, resumed = self._siblings(), self.folder.is_dir()
        for folder in siblings:
            with suppress(FileNotFoundError, PermissionError):  # already finished, or not readable by this user
                os.close(self._lock(folder))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.out}: cannot be created: {error.strerror}") from None
        self._handle = self._lock(self.folder)
        try:
            write_json(self.folder / UNFINISHED, self.provenance())  # `finish` removes it, as all hidden files
        except BaseException as error:  # a full disk, or Ctrl-C
            self.__exit__(type(error), error, None)  # Python calls it only after `__enter__`
            raise
        self._signals.enter_context(terminable())
        print(f"{self.name}: {'continues an interrupted run' if resumed else 'starts'} → {short_path(self.out)}", flush=True)
        if not resumed and siblings:
            names = ", ".join(short_path(folder) for folder in siblings)
            others = "partial results of other inputs, settings or versions remain; delete them if not needed"
            print(f"{self.name}: {others}: {names}", flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.filename = str(self.folder)  # a failed write names no file; the message must name the full disk
        if isinstance(error, Terminated):
            print(f"{self.name}: {error.reason}; the same command continues", flush=True)
        self._signals.close()
        os.close(self._handle)

    def finish(self, metrics: Metrics, files: Sequence[str]) -> Metrics:
        """Write metrics and provenance, and move the folder to `out`.

        Args:
            metrics: finite numbers by name.
            files: glob patterns of the files whose content identifies the result to later stages.

        Returns:
            `metrics`.
        """
        _remove_unfinished_files(self.folder)
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
            self.folder.replace(self.out)  # `out` is missing or empty, see _check_out
        except OSError as error:
            raise ValueError(
                f"{self.out}: cannot be replaced ({error.strerror}); "
                f"the finished result is in {self.folder}: move that folder to where you want it"
            ) from None
        return metrics

    def provenance(self) -> dict[str, Any]:
        """Return stage, settings, inputs, code version and container image."""
        image = code_image()
        return {
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "inputs": self.inputs,
            "version": __version__,
            "revision": code_revision(),
        } | ({"image": image} if image else {})

    def _lock(self, folder: Path) -> int:
        other = f"another process is writing this folder ({short_path(folder)})"
        return lock_folder(folder, f"{self.out}: {other}; wait for it or choose another folder")

    def _siblings(self) -> list[Path]:
        """List the partial results for `out` with other fingerprints."""
        name = re.compile(rf"\.{re.escape(self.out.name)}\.[0-9a-f]{{12}}\.partial")
        return sorted(path for path in self.out.parent.glob(".*.partial") if name.fullmatch(path.name) and path != self.folder)

    def _check_out(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise ValueError(f"{self.out}: must be a folder, found a file")
        if not any(self.out.iterdir()):
            return
        if not (self.out / PROVENANCE).is_file():
            raise ValueError(f"{self.out}: contains files that pixelclip did not create; choose an empty or new folder")
        recorded = read_provenance(self.out / PROVENANCE)
        if difference := self._difference(recorded):
            raise ValueError(
                f"{self.out}: contains a finished result of stage {recorded.get('stage')!r} with different inputs or settings "
                f"({difference}); remove it or choose another folder"
            )

    def _difference(self, recorded: dict[str, Any]) -> str:
        """List the differences that prevent reuse. A different code version is not one."""
        before, now = public(recorded.get("settings", {})), json.loads(json.dumps(self.settings))
        changes = {
            "stage": (recorded.get("stage"), self.name),
            "commit": (recorded.get("source", {}).get("git_sha"), self.source.get("git_sha")),
        }
        for key in {**now, **before}:
            old, new = (repr(settings[key]) if key in settings else "none" for settings in (before, now))
            changes[f"{self.name}.{key}"] = old, new
        inputs = recorded.get("inputs", {})
        different = [key for key in {**self.inputs, **inputs} if inputs.get(key, {}).get("md5") != self._md5s.get(key)]
        return ", ".join(
            [f"{key} {old} → {new}" for key, (old, new) in changes.items() if old != new]
            + [f"different {key}" for key in different]
        )


def _remove_unfinished_files(folder: Path) -> None:
    """Remove what killed writes left behind: the hidden files of `write_atomically` and of others, which end in `.partial`."""
    for path in folder.rglob(".*"):
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            path.unlink()


def _code(provenance: Mapping[str, Any]) -> str:
    return f"version {provenance.get('version')}, revision {provenance.get('revision')}"


def describe(path: Path) -> dict[str, Any]:
    """Return path, md5, number of files and size of an input and, if a stage wrote it, its provenance.

    Raises:
        ValueError: the file or folder does not exist.
    """
    location = {"path": origin(path)}
    if (path / PROVENANCE).is_file():
        document = read_json(path / PROVENANCE)
        if isinstance(document, dict) and document.keys() & {"fingerprint", "output"}:  # otherwise no stage wrote it
            provenance = read_provenance(path / PROVENANCE)
            return {**location, **provenance["output"], "provenance": provenance}
    return {**location, **digest(path)}


def read_metrics(folder: Path) -> Metrics:
    """Read the metrics of a finished stage; raise ValueError if the file is missing or damaged."""
    return dict(read_json(folder / METRICS, dict[str, FiniteFloat]))
