"""The subcommands, and the help texts of their options (app/options.py)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import torchdrop
from torchdrop.app import cli, commands, data
from torchdrop.app import compare_settings as settings
from torchdrop.app.methods import METHODS
from torchdrop.app.recipe import AUGMENTATIONS, PRESETS
from torchdrop.checks import MODES
from torchdrop.schedules import DEPTH_RULES

# A small network that trains for longer than anybody waits.
ENDLESS = [
    *("compare", "--model=resnet-8", "--methods=none", "--train-size=40", "--test-size=50"),
    *("--epochs=9999", "--batch-size=20", "--seeds=2", "--cost-steps=2", "--threads=1"),
    "--accelerator=cpu",
]
# Where pytest is started in the background by a shell, it ignores SIGINT and hands that on to the
# processes that it starts: Ctrl-C then does nothing, in any Python program.
AS_IN_A_TERMINAL = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("torchdrop", run_name="__main__", alter_sys=True)
"""


def _help(subcommand, capsys):
    """The help text as words, without the frame."""
    assert cli.main([subcommand, "--help"]) == 0
    return re.sub(r"[^\w.:;,'()+/-]+", " ", capsys.readouterr().out)


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"torchdrop {torchdrop.__version__}\n"
    assert cli.main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out
    assert cli.main(["compare", "--help"]) == 0
    assert "--resume" in capsys.readouterr().out
    assert cli.main(["comparison"]) == 2
    assert "No such command" in capsys.readouterr().err


def test_help_shows_the_defaults_that_are(capsys):
    words = _help("compare", capsys)
    recipe = settings.default_recipe()
    assert f"Passes over the training images. default: ({recipe.epochs}, or" in words
    assert f"default: ({recipe.learning_rate(0)}, or" in words
    assert (
        f"Images in a training step, over all devices. default: ({recipe.batch_size}, or" in words
    )
    assert f"default: ({recipe.augment}, or" in words
    assert f"default: ({settings.DEFAULT_TRAIN_SIZES['digits']} of digits" in words
    assert f"default: ({data.DEFAULT_TEST_SIZE} of digits and mnist5k" in words
    assert f"as they are; {data.FOLDER_IMAGE_SIZE} of a folder" in words
    assert f"default: ({settings.DEFAULT_MODEL})" in words
    phases = [
        (start / recipe.epochs, rate / recipe.learning_rate(0)) for start, rate in recipe.phases
    ]
    assert phases == [(0, 1), (1 / 2, pytest.approx(0.1)), (3 / 4, pytest.approx(0.01))]


def test_help_names_everything_that_is_registered(capsys):
    words = _help("compare", capsys)
    for name in (*METHODS, *AUGMENTATIONS, *PRESETS, *data.DATA_NAMES):
        assert name in words
    words = _help("bench", capsys)
    assert f"rates over depth: {', '.join([*DEPTH_RULES][:-1])} or {[*DEPTH_RULES][-1]}." in words
    assert f"drops a branch: {MODES[0]} or {MODES[1]}." in words


def test_help_in_a_pipe_is_plain_text():
    done = subprocess.run(
        [sys.executable, "-m", "torchdrop", "bench", "--help"],
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
        env={key: value for key, value in os.environ.items() if key != "FORCE_COLOR"},
    )
    assert "--channels-last" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("begun", "message"),
    [
        (True, "stopped; finished runs are kept, go on with: torchdrop compare 'a b' --resume"),
        (False, "stopped before anything was finished; begin again with: torchdrop compare 'a b'"),
    ],
)
def test_the_command_that_goes_on_after_ctrl_c(tmp_path, monkeypatch, begun, message):
    monkeypatch.setattr(sys, "argv", ["torchdrop", "compare", "a b", *["--resume"] * begun])
    if begun:
        (tmp_path / "results.json").touch()
    assert commands._how_to_continue(tmp_path) == message


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", AS_IN_A_TERMINAL, *ENDLESS, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "runs" / "none-0").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            # Python loses one that comes while a finalizer runs; a user presses the keys again.
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "go on with: torchdrop compare" in errors
    assert f"--out {out} --resume" in errors
    assert json.loads((out / "results.json").read_text())["status"] == "partial"
