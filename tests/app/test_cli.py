"""The entry point of the command line, and the errors that it shows (app/errors.py)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from torchdrop.app import cli, commands
from torchdrop.app.errors import UserError, one_line


def test_an_error_of_the_user_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def fails(arguments):
        raise UserError(f"no {arguments[0]};\n  give another")

    monkeypatch.setattr(commands, "command", fails)
    assert cli.main(["x"]) == 2
    assert capsys.readouterr() == ("", "torchdrop: error: no x; give another\n")


def test_ctrl_c_is_exit_code_130_and_success_is_0(monkeypatch):
    def stopped(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "command", stopped)
    assert cli.main(["x"]) == 130
    monkeypatch.setattr(commands, "command", lambda arguments: None)
    assert cli.main(["x"]) == 0
    monkeypatch.setattr(commands, "command", lambda arguments: 2)
    assert cli.main(["x"]) == 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\nlines,  much space"), "two lines, much space"),
        (KeyError(), "KeyError"),
        ("text", "text"),
    ],
)
def test_errors_are_shown_as_one_line(error, line):
    assert one_line(error) == line


def test_a_missing_extra_names_its_pip_command(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "lightning" else True)
    assert cli.main(["compare"]) == 2
    assert capsys.readouterr().err == (
        "torchdrop: error: lightning is not installed: pip install 'torchdrop[train]'\n"
    )


def test_importing_torchdrop_imports_no_extra():
    code = (
        "import sys, torchdrop\n"
        "extras = 'lightning typer rich jinja2 matplotlib sklearn torchvision'.split()\n"
        "print([name for name in extras if name in sys.modules])"
    )
    call = [sys.executable, "-c", code]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout == "[]\n"
