"""Hooks of mkdocs: pages outside `docs/` join the site, and links follow the pages to their place in it."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md")
"""Pages outside `docs/`, by their path in the repository, which is also their path in the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside `docs/`; the README is the home page."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the pages of the site; a link to another file of the repository becomes the file's name."""
    source = page.file.src_uri
    folder = posixpath.dirname(source if source in OUTSIDE else f"docs/{source}")

    def moved(link: re.Match[str]) -> str:
        text, target, anchor = link[1], posixpath.normpath(posixpath.join(folder, link[2])), link[3] or ""
        place = target if target in OUTSIDE else target.removeprefix("docs/")
        if files.get_file_from_path(place) is None:
            return text if "`" in text else f"`{target}`"
        return f"[{text}]({posixpath.relpath(place, posixpath.dirname(source) or '.')}{anchor})"

    return re.sub(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)]*)?\)", moved, markdown)
