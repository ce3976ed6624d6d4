from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys

import pytest

from torchdrop.app import results
from torchdrop.app.errors import UserError
from torchdrop.app.results import FIGURES, Results, locked

CONFIG = {"model": "resnet-8", "methods": {"none": None, "dropout": 0.3}, "recipe": {"epochs": 2}}
CURVES = {"train_loss": [1.0], "test_epoch": [1], "test_error": [0.5]}


def _figures(**changed):
    return {**dict.fromkeys(FIGURES, 2.0), "epoch": 2, "seconds": 1.0, "curves": CURVES, **changed}


def _filled(folder):
    found = Results(folder, CONFIG)
    found.begin("none", p=None, asked_p=None, summary="")
    found.begin("dropout", p=0.3, asked_p=0.3, summary="")
    found.add("dropout", 1, **_figures(test_error=0.4, step_ms=3.0))
    found.add("dropout", 0, **_figures(test_error=0.2, step_ms=3.0))
    found.add("none", 0, **_figures(observed_p=None))
    found.save()
    return found


def test_file_has_the_figures_of_each_seed_and_their_means(tmp_path):
    _filled(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    dropout = content["methods"]["dropout"]
    assert [seed["seed"] for seed in dropout["seeds"]] == [0, 1]
    assert set(FIGURES) <= set(dropout["seeds"][0])
    assert dropout["mean"]["test_error"] == pytest.approx(0.3)
    assert dropout["std"]["test_error"] == pytest.approx(math.sqrt(0.02))
    assert dropout["ratio"] == {"step_ms": 1.5, "flops": 1.0, "saved_bytes": 1.0}
    assert content["methods"]["none"]["std"]["test_error"] is None
    assert content["methods"]["none"]["mean"]["observed_p"] is None
    assert content["status"] == "partial"
    assert {"torch", "python", "torchdrop"} <= set(content["versions"])
    assert {"processor", "threads"} <= set(content["machine"])


def test_figures_that_are_not_finite_are_null(tmp_path):
    found = Results(tmp_path, CONFIG)
    found.add("none", 0, **_figures(test_nll=math.nan))
    found.add("none", 1, **_figures())
    found.save()
    content = json.loads((tmp_path / "results.json").read_text())["methods"]["none"]
    assert content["seeds"][0]["test_nll"] is None
    # A mean of the other seeds alone would hide it.
    found.save()
    assert found.content["methods"]["none"]["mean"]["test_nll"] is None


def test_results_are_never_overwritten(tmp_path):
    _filled(tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(UserError, match=r"holds results already; give --resume .*or another --out"):
        Results(tmp_path, CONFIG)
    assert (tmp_path / "results.json").read_bytes() == before


def test_resume_knows_what_is_finished(tmp_path):
    _filled(tmp_path)
    again = Results(tmp_path, CONFIG, resume=True)
    assert again.finished("dropout", 1)
    assert not again.finished("none", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "resnet-20"}, "model is resnet-8 there, resnet-20 here"),
        ({"methods": {"none": None, "dropout": 0.5}}, r"methods.dropout is 0.3 there, 0.5 here"),
        ({"methods": {"none": None}}, "methods.dropout is 0.3 there, nothing here"),
        ({"recipe": {"epochs": 3}}, "recipe.epochs is 2 there, 3 here"),
        ({"extra": 1}, "extra is nothing there, 1 here"),
    ],
)
def test_another_configuration_is_refused_by_its_first_field(tmp_path, change, message):
    _filled(tmp_path)
    with pytest.raises(UserError, match=message):
        Results(tmp_path, {**CONFIG, **change}, resume=True)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 99}', "\x00"])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot go on with .*results\.json.* another --out"):
        Results(tmp_path, CONFIG, resume=True)
    assert (tmp_path / "results.json").read_text() == text


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_no_space_is_one_line_and_loses_nothing(tmp_path, monkeypatch, step):
    found = _filled(tmp_path)
    before = (tmp_path / "results.json").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results.os, step, full)
    found.add("none", 1, **_figures())
    with pytest.raises(UserError, match=r"No space left on device\); make room or choose another"):
        found.save()
    assert (tmp_path / "results.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(
            UserError, match=r"cannot write in .*Not a directory\); choose another --out"
        ),
        locked(tmp_path / "file" / "out"),
    ):
        pass


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a file system that is read-only")
def test_no_right_to_write_is_one_line():
    with (
        pytest.raises(UserError, match="cannot write in '/proc/torchdrop'"),
        locked(results.Path("/proc/torchdrop")),
    ):
        pass


def test_two_comparisons_in_one_folder_refuse_each_other(tmp_path):
    with locked(tmp_path):
        with (
            pytest.raises(UserError, match=r"another torchdrop is at work in .*; wait for it or"),
            locked(tmp_path),
        ):
            pass
        # It is the holder's still.
        with pytest.raises(UserError, match="another torchdrop"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from torchdrop.app.results import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another torchdrop is at work"), locked(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_one_line(tmp_path, monkeypatch, code):
    """No lock that is only a file either: it would outlive a process that is killed."""
    import fcntl

    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    message = r"cannot lock .*; choose an --out on a local disk"
    with pytest.raises(UserError, match=message), locked(tmp_path):
        pass


def test_the_error_of_the_body_leaves_the_lock_free(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass
