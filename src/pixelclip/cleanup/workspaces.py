"""Workspaces on a disk: folders in which stages of pixelclip, or KFP's local runners, wrote their outputs."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pixelclip.cleanup.named import Named, recipe
from pixelclip.cleanup.policy import Item
from pixelclip.storage.files import TRASH, lock_folder, remove_folder, short_path
from pixelclip.workflow.provenance import UNFINISHED, read_provenance, read_unfinished
from pixelclip.workflow.stage import PARTIAL, PROVENANCE

_LOCAL_RUN = re.compile(r".+-\d{4}(-\d\d){5}-\d{6}")
"""Folder of one run of KFP's local runners: name of the pipeline, and the time."""
_PIPELINE = {".kfp", "pipeline.log"}
_JOURNAL = {"run.json", "curves.jsonl", "curves.csv"}
"""Files in the output of a training that change once more when a later stage sends to MLflow what a lost connection left."""
_OWN_FILES = {
    *_PIPELINE,
    *("metrics.json", "report.html"),
    *("table.md", "runs.csv", "sweep.png", "best.yaml", "search.json", "reproduction.json"),
    *_JOURNAL,
}
"""Files of `pipeline run`, `sweep` and `reproduce` beside the outputs of stages."""
TOLERANCE = 60.0
"""Seconds by which a file may be newer than the provenance of its output, which is written last: clocks of file servers differ,
and copying a folder without its times takes a while."""
_DEPTH = 3  # folders below a root in which workspaces are searched


def items(roots: Sequence[Path], named: Named, tolerance: float = TOLERANCE) -> list[Item]:
    """Return the workspaces below some folders. What an unfinished stage in another one reads stays, too.

    A workspace is a folder that directly contains outputs of stages. An output directly in one of `roots`, and a run of KFP's
    local runners, are items of their own.

    Args:
        roots: the folders.
        named: what must stay.
        tolerance: seconds by which a file in an output may be newer than its provenance. Another one is a person's change.

    Raises:
        ValueError: no such folder.
    """
    if missing := [root for root in roots if not root.is_dir()]:
        raise ValueError(f"{missing[0]}: no such folder of workspaces")
    found = {path: _scan(path, tolerance) for root in roots for path in _find(root.absolute(), _DEPTH)}
    read = {path: Named() for path in found}
    for path, content in found.items():
        for folder in content.unfinished:
            with contextlib.suppress(ValueError):  # written by a former version, or damaged
                read[path].add_lineage(read_unfinished(folder / UNFINISHED), f"read by the unfinished {short_path(folder)}")
    return [
        _item(path, content, [named, *(each for reader, each in read.items() if reader != path)], tolerance)
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


def _scan(path: Path, tolerance: float) -> _Content:
    scan = _Scan(path, tolerance)
    try:
        scan.walk(path, None, bool(TRASH.fullmatch(path.name)))
    except OSError as error:
        scan.content.problem = f"{error.filename}: {error.strerror}"
    return scan.content


class _Scan:
    """Read the content of a workspace, and look for files that pixelclip did not write."""

    def __init__(self, path: Path, tolerance: float) -> None:
        self.path, self.tolerance = path, tolerance
        self.content = _Content()

    def walk(self, folder: Path, written: float | None, own: bool) -> bool:
        """Add a folder, and return whether an output or an unfinished stage is in it.

        Args:
            folder: the folder.
            written: when the provenance of the output that contains it was written; None outside of outputs.
            own: whether all files belong to pixelclip or KFP, whatever their names.
        """
        if PARTIAL.fullmatch(folder.name):
            self.content.unfinished.append(folder)
            written, own = None, True  # also below a result, which is older
        elif (folder / PROVENANCE).is_file():
            self.content.outputs.append(folder)
            written = max(written or 0.0, (folder / PROVENANCE).stat().st_mtime)
        own = own or folder.name == ".kfp" or bool(_LOCAL_RUN.fullmatch(folder.name))
        self.content.changed = max(self.content.changed, folder.stat().st_mtime)
        entries = list(os.scandir(folder))
        below = [self.walk(Path(entry), written, own) for entry in entries if entry.is_dir(follow_symlinks=False)]
        holds = any(below) or own or written is not None
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                self._add(entry, written, own, holds or folder == self.path)
        return holds

    def _add(self, entry: os.DirEntry[str], written: float | None, own: bool, beside: bool) -> None:
        """Add a file; `beside` tells whether it lies where pixelclip writes files beside outputs."""
        state = entry.stat(follow_symlinks=False)
        self.content.size += state.st_size
        self.content.changed = max(self.content.changed, state.st_mtime)
        shown = Path(entry).relative_to(self.path)
        problem = ""
        if written is not None:  # what a person changed in a result, such as a corrected label map
            if state.st_mtime > written + self.tolerance and entry.name not in _JOURNAL:
                problem = f"contains {shown}, which is newer than the result that it belongs to"
        elif not own and not (beside and entry.name in _OWN_FILES):
            problem = f"contains {shown}, which pixelclip did not write"
        self.content.problem = self.content.problem or problem


def _item(path: Path, content: _Content, named: Sequence[Named], tolerance: float) -> Item:
    kept = content.problem or _reason(path, content, named)
    resumable = bool(content.unfinished) or (path / ".kfp").is_dir()
    leftover = bool(TRASH.fullmatch(path.name))
    delete = partial(_delete, path, content, tolerance)
    return Item(short_path(path), content.size, content.changed, delete, "" if leftover else kept, resumable, leftover)


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
            handles.callback(os.close, lock_folder(folder, f"running: a process is writing {folder.name}"))
        yield


def _delete(path: Path, content: _Content, tolerance: float) -> None:
    """Delete a workspace.

    Raises:
        ValueError: it has changed since it was listed, or a process is working in it.
    """
    try:
        with _locked(content.unfinished):
            # Compared under the locks, so that no unfinished stage continues between the comparison and the deletion.
            if not TRASH.fullmatch(path.name) and _scan(path, tolerance) != content:
                raise ValueError("has changed since it was listed")
            remove_folder(path)
    except FileNotFoundError:  # a stage has finished
        raise ValueError("has changed since it was listed") from None
