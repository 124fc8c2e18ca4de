"""Workspaces on a disk: folders in which stages of pixelclip, or KFP's local runners, wrote their outputs."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pixelclip.cleanup.named import Named, recipe
from pixelclip.cleanup.policy import Item
from pixelclip.storage.files import TRASH, remove_folder
from pixelclip.workflow.provenance import UNFINISHED, read_provenance, read_unfinished
from pixelclip.workflow.stage import PARTIAL, PROVENANCE

_LOCAL_RUN = re.compile(r".+-\d{4}(-\d\d){5}-\d{6}")
"""Folder of one run of KFP's local runners: name of the pipeline, and the time."""
_PIPELINE = {".kfp", "pipeline.log"}
_OWN_FILES = {
    *_PIPELINE,
    *("metrics.json", "report.html"),
    *("table.md", "runs.csv", "sweep.png", "run.json", "curves.jsonl", "curves.csv", "reproduction.json"),
}
"""Files of `pipeline run`, `sweep` and `reproduce` beside the outputs of stages."""
_DEPTH = 3  # folders below a root in which workspaces are searched


def items(roots: Sequence[Path], named: Named) -> list[Item]:
    """Return the workspaces below some folders. What an unfinished stage in another one reads stays, too.

    A workspace is a folder that directly contains outputs of stages. An output directly in one of `roots`, and a run of KFP's
    local runners, are items of their own.

    Raises:
        ValueError: no such folder.
    """
    if missing := [root for root in roots if not root.is_dir()]:
        raise ValueError(f"{missing[0]}: no such folder of workspaces")
    found = {path: _scan(path) for root in roots for path in _find(root.absolute(), _DEPTH)}
    read = {path: Named() for path in found}
    for path, content in found.items():
        for folder in content.unfinished:
            with contextlib.suppress(ValueError):  # written by a former version, or damaged
                read[path].add_lineage(read_unfinished(folder / UNFINISHED), f"read by the unfinished {_short(folder)}")
    return [
        _item(path, content, [named, *(each for reader, each in read.items() if reader != path)])
        for path, content in found.items()
    ]


@dataclass
class _Content:
    """Content of a workspace: bytes, last change, outputs, unfinished stages, and what prevents its deletion."""

    size: int = 0
    changed: float = 0.0
    outputs: list[Path] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    problem: str = ""


def _find(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the items below a folder."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir():
            continue
        if TRASH.fullmatch(path.name) or _LOCAL_RUN.fullmatch(path.name) or _is_output(path) or _is_workspace(path):
            yield path
        elif depth > 1 and not path.name.startswith("."):
            with contextlib.suppress(PermissionError):
                yield from _find(path, depth - 1)


def _is_output(path: Path) -> bool:
    return bool(PARTIAL.fullmatch(path.name)) or (path / PROVENANCE).is_file()


def _is_workspace(path: Path) -> bool:
    with contextlib.suppress(PermissionError):
        return any(entry.name in _PIPELINE or (entry.is_dir() and _is_output(entry)) for entry in path.iterdir())
    return False


def _scan(path: Path) -> _Content:
    content = _Content()

    def walk(folder: Path, own: bool) -> None:
        own = own or _is_output(folder) or folder.name == ".kfp" or bool(_LOCAL_RUN.fullmatch(folder.name))
        if PARTIAL.fullmatch(folder.name):
            content.unfinished.append(folder)
        elif (folder / PROVENANCE).is_file():
            content.outputs.append(folder)
        content.changed = max(content.changed, folder.stat().st_mtime)
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                walk(Path(entry), own)
                continue
            state = entry.stat(follow_symlinks=False)
            content.size += state.st_size
            content.changed = max(content.changed, state.st_mtime)
            if not own and entry.name not in _OWN_FILES and not content.problem:
                content.problem = f"contains {Path(entry).relative_to(path)}, which pixelclip did not write"

    try:
        walk(path, bool(TRASH.fullmatch(path.name)))
    except OSError as error:
        content.problem = f"{error.filename}: {error.strerror}"
    return content


def _item(path: Path, content: _Content, named: Sequence[Named]) -> Item:
    kept = content.problem or _reason(path, content, named)
    resumable = bool(content.unfinished) or (path / ".kfp").is_dir()
    leftover = bool(TRASH.fullmatch(path.name))
    delete = partial(_delete, path, content)
    return Item(_short(path), content.size, content.changed, delete, "" if leftover else kept, resumable, leftover)


def _reason(path: Path, content: _Content, named: Sequence[Named]) -> str:
    """Return why a workspace must stay, or an empty string."""
    try:
        made = [read_provenance(output / PROVENANCE) for output in content.outputs]
        with _locked(content.unfinished):
            pass
    except (ValueError, OSError) as error:
        return str(error)
    for each in named:
        if reason := each.of_path(path):
            return reason
        for provenance in made:
            if found := each.md5s.get(provenance["output"]["md5"]) or each.md5s.get(recipe(provenance)):
                return found
    return ""


@contextlib.contextmanager
def _locked(folders: Sequence[Path]) -> Iterator[None]:
    """Lock unfinished stages as `Stage` does.

    Raises:
        ValueError: a process is working in one.
    """
    with ExitStack() as handles:
        for folder in folders:
            handle = os.open(folder, os.O_RDONLY)
            handles.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"running: a process is writing {folder.name}") from None
        yield


def _delete(path: Path, content: _Content) -> None:
    if not TRASH.fullmatch(path.name) and _scan(path) != content:
        raise ValueError("has changed since it was listed")
    with _locked(content.unfinished):
        remove_folder(path)


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
