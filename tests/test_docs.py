"""The documentation agrees with the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from pixelclip.cli.app import app
from pixelclip.settings import as_table

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "components" / "README.md", ROOT / "examples" / "cluster" / "README.md"]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *FOLDERS, *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands


def test_settings_page_equals_output_of_the_command():
    assert as_table().strip() in (ROOT / "docs" / "settings.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_exist(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_exist(page):
    for block in re.findall(r"```[a-z]*\n(.*?)```", page.read_text(), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\S+=\S+ )*(?:\.venv/bin/)?pixelclip (\S+)(.*)", line)
            if not found:
                continue
            command, rest = COMMANDS[found[1]], found[2]
            for word in rest.split():
                if hasattr(command, "commands"):
                    command = command.commands[word]
            options = {option for parameter in command.params for option in parameter.opts}
            assert set(re.findall(r"(?<= )--[a-z-]+", rest)) <= options, line


def test_the_site_contains_every_page_and_has_no_broken_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, timeout=120)
    built = {page.stem for page in tmp_path.rglob("*.html")}
    assert {page.stem for page in PAGES} - {"README"} <= built
    assert 'href="deploy/index.html"' in (tmp_path / "index.html").read_text()


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert set(re.findall(r"`?make ([a-z-]+)`?", (ROOT / "README.md").read_text())) <= set(targets)


def test_requirements_are_pinned_and_name_no_index():
    text = (ROOT / "requirements.txt").read_text()
    assert "://" not in text
    assert "--index" not in text
    assert all("==" in line for line in text.splitlines() if line and not line.lstrip().startswith("#"))


def test_params_and_dvc_files_are_yaml_with_the_same_stages():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    stages = ["toy", "fetch_data", *(stage for stage in list(stages)[1:] if stage != "evaluate_clip")]  # see test_faces.py
    assert stages == list(yaml.safe_load((ROOT / "params.yaml").read_text()))
