"""Fonts for class names in any script. Pillow's own font has only ASCII."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# File names, which Pillow looks up in the system's font folders: Linux, then Windows and macOS.
_SYSTEM = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "msyh.ttc",
    "Arial Unicode.ttf",
)
_UNASSIGNED = "\U0010ffff"  # every font draws it as it draws characters that it lacks


def typeset(entries: Sequence[tuple[int, str]], size: int) -> list[tuple[str, Font]]:
    """Return each text with a font that has its characters: Pillow's, matplotlib's DejaVu Sans or one of the system.

    Args:
        entries: number and text. Characters that no font has are replaced by `#number`.
        size: size of the letters in pixels.
    """
    fonts: list[Font] = [ImageFont.load_default(size)]
    if any(_missing(text, fonts[0]) for _, text in entries):
        fonts += _installed(size)
    chosen = [(number, text, min(fonts, key=lambda font: len(_missing(text, font)))) for number, text in entries]
    return [(replace_missing(text, font, number), font) for number, text, font in chosen]


def replace_missing(text: str, font: Font, number: int) -> str:
    """Replace words and parts of words that the font lacks, and would draw as empty boxes, by `#number`."""
    if not (missing := _missing(text, font)):
        return text
    run = f"[{re.escape(''.join(missing))}]+"
    return re.sub(rf"{run}(\s+{run})*", f"#{number}", text)


def dejavu_sans() -> Path | None:
    """Return the font file (Latin, Greek, Cyrillic) that matplotlib ships; None without matplotlib, which is not imported."""
    found = find_spec("matplotlib")
    return Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if found and found.origin else None


def _installed(size: int) -> Iterator[Font]:
    for name in (dejavu_sans(), *_SYSTEM):
        try:
            if name:
                yield ImageFont.truetype(name, size)
        except OSError:  # there is no such font
            continue


def _missing(text: str, font: Font) -> set[str]:
    box = bytes(font.getmask(_UNASSIGNED))
    invisible = ("Cc", "Cf", "Mn", "Me", "Zs")  # spaces, and marks on other characters
    return {c for c in text if unicodedata.category(c) not in invisible and bytes(font.getmask(c)) == box}
