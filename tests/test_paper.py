"""Every command of docs/paper.md is accepted by the command line's parser and the settings' loader; nothing is run."""

import re
import shlex
from pathlib import Path

import open_clip
import pytest
import typer

from pixelclip.cli.app import app
from pixelclip.commands import sweep
from pixelclip.config import STAGES
from pixelclip.data.class_names import names_of
from pixelclip.evaluation.protocol import parse_labelled_sets
from pixelclip.models.convert import REFERENCE_CLIPS
from pixelclip.settings import load, parse_overrides

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text()
ROOT_COMMAND = typer.main.get_command(app)


def expand(text: str, variables: dict[str, str]) -> str:
    for name in sorted(variables, key=len, reverse=True):
        text = text.replace(f"${name}", variables[name])
    return text


def commands() -> list[str]:
    """Return the commands of the page's blocks, with variables and loops of the shell expanded."""
    found: list[str] = []
    variables: dict[str, str] = {}
    loop: tuple[str, list[str]] | None = None
    for block in re.findall(r"```\n(.*?)```", PAGE, flags=re.S):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            line = line.strip()
            if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[assigned[1]] = assigned[2]
            elif started := re.fullmatch(r"for (\w+) in (.*); do", line):
                loop = (started[1], started[2].split())
            elif line == "done":
                loop = None
            elif line:
                name, values = loop or ("", [""])
                found += [expand(line, variables | ({name: value} if name else {})) for value in values]
    return found


def check_clip(spec: str) -> None:
    """Check the names of a CLIP and its published weights."""
    name, _, tag = spec.partition(":")
    assert tag in open_clip.list_pretrained_tags_by_model(name), spec


def check_labelled(words: list[str], config) -> None:
    for word, (_, read) in zip(words, parse_labelled_sets(words, config).values(), strict=True):
        assert read.kind == (word.partition(":")[0] if ":" in word else "folder")


@pytest.mark.parametrize("command", commands())
def test_words_and_settings_are_accepted(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "$" not in command
    words = shlex.split(command, comments=True)
    words = words[words.index("pixelclip") + 1 :]
    group = ROOT_COMMAND
    while hasattr(group, "commands"):
        group, words = group.commands[words[0]], words[1:]
    parsed = group.make_context(group.name, words).params
    stage = "evaluate" if group.name == "evaluate_clip" else group.name
    if stage in ("sweep", "compile-sweep"):
        assert sweep.read(parsed["file"], parsed["params"])[1]
    if stage not in STAGES:
        return
    overrides = parse_overrides([*(parsed["settings"] or []), *([f"part={parsed['part']}"] if parsed.get("part") else [])])
    config = load(stage, parsed["params"], overrides)
    if "labelled" in parsed:
        check_labelled(parsed["labelled"], config)
    if group.name == "evaluate_clip" and parsed["clip"]:
        check_clip(parsed["clip"])
    if stage == "train":
        check_clip(config.clip)
        assert not config.concept_names or len(names_of(config.concept_names)) == 171


def test_every_table_has_its_rows():
    sections = re.split(r"^### ", PAGE.partition("## Rows of the paper's tables")[2], flags=re.M)
    titles = [section.partition(":")[0] for section in sections[1:]]
    assert titles == ["Table 1", "Table 2", "Table 3", "Table 5", "Table 6", "Supplement"]
    trained = [re.search(r"--out (\S+)", line)[1] for line in commands() if line.startswith("pixelclip train")]
    ours = [folder for folder in trained if re.match(r"work/(t\d|supplement)/", folder)]
    assert len(set(ours)) == len(ours) == 4 + 1 + 14 + 1 + 3 + 2
    evaluated = {word for line in commands() for word in re.findall(r"pixelclip evaluate --model (\S+)", line)}
    assert set(ours) <= evaluated | {"work/t2/large"}


def test_baseline_of_the_large_convnext_is_the_reference_s():
    """The reference's predictor loads this tag for every ConvNeXt that is not a base."""
    assert REFERENCE_CLIPS["convnext_large_d_320"] == "laion2b_s29b_b131k_ft_soup"
