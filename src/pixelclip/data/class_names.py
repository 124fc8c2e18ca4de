"""Class names: check them, read them from a file, parse them from one line of text."""

from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from pixelclip.workflow.bad_samples import CONTROL

SHIPPED = ("reference", "readable")
"""Shipped lists of a benchmark's class names, see docs/paper.md."""


def check_names(names: Sequence[str], source: str = "classes") -> list[str]:
    """Return the class names without surrounding white space.

    Raises:
        ValueError: the list is empty, or a name is blank, a duplicate, or contains control characters.
    """
    stripped = [name.strip() for name in names]
    if not stripped:
        raise ValueError(f"{source}: the list of class names is empty; at least one name is needed")
    blanks = [str(i + 1) for i, name in enumerate(stripped) if not name.strip(", ")]
    if blanks:
        raise ValueError(f"{source}: blank class name at position {', '.join(blanks)}")
    if odd := [name for name in stripped if CONTROL.search(name)]:
        raise ValueError(f"{source}: class names must not contain control characters, found {odd[0]!a}")
    duplicates = sorted(name for name, count in Counter(stripped).items() if count > 1)
    if duplicates:
        raise ValueError(f"{source}: class names must differ, found twice: {', '.join(map(repr, duplicates))}")
    return stripped


def read_classes(path: Path) -> list[str]:
    """Read class names from a text file, one per line; a bar or a comma separates synonyms of one class.

    Raises:
        ValueError: the file is missing or empty, or a name is blank or a duplicate; the message names the file.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read class names (one per line): {error}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    return check_names([with_commas(line) if "|" in line else line for line in lines], str(path))


def benchmark_names(names: str, kind: str) -> list[str]:
    """Return the class names of a benchmark in the order of its labels.

    Args:
        names: one of `SHIPPED`, or a text file with one name per line.
        kind: name of the benchmark, which a file does not depend on.

    Raises:
        ValueError: neither a shipped list nor a file, or as `read_classes`.
    """
    if names in SHIPPED:
        file = resources.files("pixelclip").joinpath(f"assets/classes/{names}/{kind}.txt")
        return check_names(file.read_text(encoding="utf-8").splitlines(), kind)
    if not Path(names).is_file():
        raise ValueError(f"{names!r} must be {', '.join(SHIPPED)} or a file with one class name per line")
    return read_classes(Path(names))


def parse_names(text: str) -> list[str]:
    """Parse class names from one line, `dog|puppy,grass,sky`; a bar separates synonyms of one class.

    Raises:
        ValueError: see `check_names`.
    """
    return check_names([with_commas(name) for name in text.split(",")] if text.strip() else [])


def check_list(classes: Sequence[str]) -> list[str]:
    """Return class names of a Python caller, `["dog|puppy", "grass"]`, without surrounding white space.

    Raises:
        ValueError: a single text, or a name that is no text.
    """
    example = '["dog|puppy", "grass"]'
    if isinstance(classes, str):
        raise ValueError(f"classes: expected a list of names such as {example}, found the text {classes!r}")
    names = list(classes)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"classes: expected names such as {example}, found {wrong[0]!r}")
    return [name.strip() for name in names]


def with_commas(name: str) -> str:
    """Return a name whose synonyms are separated by bars, `dog|puppy`, with commas: `dog, puppy`."""
    return ", ".join(word.strip() for word in name.split("|"))


def names_file(text: str) -> Path | None:
    """Return the file that a user's class names refer to, `*.txt` or any existing file; None for a line of names."""
    file = Path(text)
    try:
        return file if file.suffix == ".txt" or file.is_file() else None
    except OSError:  # a list of names can exceed the maximum length of a file name
        return None


def names_of(text: str) -> list[str]:
    """Return class names from a user's input: a file (see `names_file`) or one line of names."""
    file = names_file(text)
    return parse_names(text) if file is None else read_classes(file)
