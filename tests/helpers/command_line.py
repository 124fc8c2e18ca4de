"""Run the command line in this process."""

import sys

import pytest

from pixelclip.cli.app import main


@pytest.fixture
def pixelclip(monkeypatch, capsys):
    """Return a function that runs a command and returns exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pixelclip", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
