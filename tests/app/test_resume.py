"""A comparison that is killed and resumed ends like one that was not; what it lost is nothing.

The same with real processes, killed at random moments: benchmarks/soak/kill.py.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys

import pytest
import torch

from torchdrop.app import cli, compare, results, training
from torchdrop.app.compare import Settings
from torchdrop.app.errors import UserError
from torchdrop.app.report import write_report
from torchdrop.app.results import Results
from torchdrop.app.table import table

METHODS = ("stochastic_depth_batch", "subsample")


class Killed(BaseException):
    """What no handler of ours catches: the nearest thing to SIGKILL inside a process."""


def _small(out, **changes):
    settings = {
        "methods": METHODS,
        "model": "resnet-8",
        "train_size": 20,
        "test_size": 20,
        "epochs": 2,
        "batch_size": 10,
        "seeds": 1,
        "cost_steps": 1,
        "threads": 1,
        "accelerator": "cpu",
        "progress": False,
    }
    return Settings(out=out, **{**settings, **changes})


def _run(settings):
    return compare.compare(settings, lambda line: None)


def content_of(out):
    return json.loads((out / "results.json").read_text())


def without_clocks(content):
    """Everything but what depends on clocks."""
    content = json.loads(json.dumps(content))
    for costs in content["costs"].values():
        for cost in costs.values():
            del cost["step_ms"]
    for method in content["methods"].values():
        for figures in (method["mean"], method["std"], method["ratio"]):
            del figures["step_ms"]
        for seed in method["seeds"]:
            del seed["step_ms"], seed["seconds"]
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What comes out where nobody is killed."""
    out = tmp_path_factory.mktemp("whole")
    _run(_small(out))
    return out


@pytest.fixture(autouse=True)
def _checkpoint_each_epoch(monkeypatch):
    monkeypatch.setattr(
        compare, "Run", functools.partial(training.Run, checkpoint_seconds=0.0), raising=True
    )


@pytest.fixture
def trained(monkeypatch):
    """The labels of the runs that began, and how many epochs were trained in all."""
    seen = {"epochs": 0}
    real = training.Observer.on_train_epoch_start

    def count(self, *args):
        seen["epochs"] += 1
        real(self, *args)

    monkeypatch.setattr(training.Observer, "on_train_epoch_start", count)
    return seen


def _dies_at(monkeypatch, owner, name, call, after=False):
    """Let the process die at a call of a function, before or after what it does."""
    real, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        found = real(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return found

    monkeypatch.setattr(owner, name, dying)


# Where it dies, and how many of the 6 epochs are left then. None: not even the costs are known.
MOMENTS = {
    "while costs are measured": ((compare, "time_steps", 1), None),
    "before the first results are in place": ((results.os, "replace", 1), None),
    "after the first results": ((Results, "save", 1, True), 6),
    "at the second epoch of the second run": ((training.Observer, "on_train_epoch_start", 4), 3),
    "with a checkpoint half in place": ((training.os, "replace", 6), 4),
    "after training, before its outcome": ((training.Observer, "on_fit_end", 2), 2),
    "after its outcome, before the results": ((compare, "largest_shift", 2), 2),
    "while the results are written": ((results, "write_whole", 3), 2),
    "with the last results written": ((Results, "save", 5, True), 0),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_ends_like_one_that_was_not(
    moment, whole, tmp_path, monkeypatch, trained
):
    where, left = MOMENTS[moment]
    with monkeypatch.context() as patch:
        _dies_at(patch, *where)
        with pytest.raises(Killed):
            _run(_small(tmp_path))
    if left is None:
        with pytest.raises(UserError, match=r"no results in .* leave --resume out to begin"):
            _run(_small(tmp_path, resume=True))
    trained["epochs"] = 0
    again = _run(_small(tmp_path, resume=left is not None))
    assert trained["epochs"] == (6 if left is None else left)
    assert without_clocks(again) == without_clocks(content_of(whole))
    assert content_of(tmp_path) == again
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "results.json"]


def test_the_comparison_of_figures_would_see_a_draw_that_is_not_repeated(
    whole, tmp_path, monkeypatch
):
    """The twin: an epoch that is not seeded goes on otherwise after a kill."""
    real = training.Observer.on_train_epoch_start

    def unseeded(self, *args):
        state = torch.get_rng_state()
        real(self, *args)
        if args[0].current_epoch:
            torch.set_rng_state(state)

    monkeypatch.setattr(training.Observer, "on_train_epoch_start", unseeded)
    _run(_small(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        _dies_at(patch, training.Observer, "on_train_epoch_start", 4)
        with pytest.raises(Killed):
            _run(_small(tmp_path / "part"))
    torch.manual_seed(1)
    again = _run(_small(tmp_path / "part", resume=True))
    assert without_clocks(again) != without_clocks(content_of(tmp_path / "whole"))


def test_seeds_and_methods_may_be_added(whole, tmp_path, trained):
    """What is there is not run again, and all is as if it had been asked for at once."""
    shutil.copytree(whole, tmp_path / "grown")
    before = content_of(whole)
    more = {"methods": ("drop_path", *METHODS), "seeds": 2}
    grown = _run(_small(tmp_path / "grown", resume=True, **more))
    assert trained["epochs"] == 2 * (4 * 2 - 3)
    assert without_clocks(grown) == without_clocks(_run(_small(tmp_path / "once", **more)))
    assert grown["config"]["seeds"] == 2
    for name, method in before["methods"].items():
        old, new = method["seeds"][0], grown["methods"][name]["seeds"][0]
        assert {key: old[key] for key in old if key != "step_ms"} == {
            key: new[key] for key in new if key != "step_ms"
        }
    # Step times are comparable only where they were taken side by side: all were taken again.
    assert all(
        method["seeds"][seed]["step_ms"] == grown["costs"][str(seed)][name]["step_ms"]
        for name, method in grown["methods"].items()
        for seed in range(2)
    )
    with pytest.raises(UserError, match="seeds is 2 there, 1 here"):
        _run(_small(tmp_path / "grown", resume=True, methods=more["methods"]))
    with pytest.raises(UserError, match=r"methods.drop_path is 0\.\d+ there, nothing here"):
        _run(_small(tmp_path / "grown", resume=True, seeds=2))


def test_a_method_added_later_must_not_change_what_another_one_follows(whole, tmp_path):
    """The rate of `subsample` was measured against rows at their default rate."""
    shutil.copytree(whole, tmp_path / "out")
    settings = _small(
        tmp_path / "out",
        methods=(*METHODS, "stochastic_depth_row"),
        p=("stochastic_depth_row=0.9",),
        resume=True,
    )
    with pytest.raises(UserError, match=r"costs_like\.subsample is 0\.\d+ there, 0\.9 here"):
        _run(settings)


@pytest.mark.parametrize("there", [True, False])
def test_resume_where_nothing_is_says_so_and_makes_nothing(tmp_path, capsys, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    assert cli.main(["compare", "--resume", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: there are no results in '.*out' to go on with; leave --resume", error)
    assert error.count("\n") == 1
    assert out.exists() == there
    assert list(tmp_path.rglob("*")) == [out] * there


def test_checkpoints_without_results_are_of_nobody_knows_what(whole, tmp_path, monkeypatch):
    """A folder whose results were removed: its checkpoints must not be gone on with."""
    with monkeypatch.context() as patch:
        _dies_at(patch, training.Observer, "on_train_epoch_start", 5)
        with pytest.raises(Killed):
            _run(_small(tmp_path, epochs=3))
    (tmp_path / "results.json").unlink()
    assert list(tmp_path.glob("runs/*/last.ckpt"))
    assert without_clocks(_run(_small(tmp_path))) == without_clocks(content_of(whole))


# --- files that are not what they were


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def _damaged(path, how, tmp_path):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "code":
        torch.save(Evil(tmp_path / "ran"), path)
    elif how == "other":
        torch.save({"state_dict": {"model.x": torch.ones(1)}, "weights": {}, "history": {}}, path)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two folders of a comparison that was killed: with a checkpoint, and with an outcome."""
    found = {}
    for name, where in (
        ("last.ckpt", (training.Observer, "on_train_epoch_start", 4)),
        ("outcome.pt", (compare, "largest_shift", 2)),
    ):
        found[name] = tmp_path_factory.mktemp("killed")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compare, "Run", functools.partial(training.Run, checkpoint_seconds=0.0))
            _dies_at(patch, *where)
            with pytest.raises(Killed):
                _run(_small(found[name]))
    return found


@pytest.mark.parametrize("name", ["last.ckpt", "outcome.pt"])
@pytest.mark.parametrize("how", ["truncated", "empty", "code", "other"])
def test_a_damaged_file_of_a_run_is_named_and_the_rest_is_kept(name, how, whole, killed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(killed[name], out)
    (path,) = out.glob(f"runs/*/{name}")
    _damaged(path, how, tmp_path)
    before = content_of(out)
    with pytest.raises(
        UserError,
        match=rf"cannot go on from '.*{re.escape(name)}' \(.*\); remove it and this run is trained "
        r"again, finished runs are kept",
    ):
        _run(_small(out, resume=True))
    assert not (tmp_path / "ran").exists()
    assert content_of(out) == before
    if how == "truncated":
        path.unlink()
        again = _run(_small(out, resume=True))
        assert without_clocks(again) == without_clocks(content_of(whole))


def test_a_file_that_runs_code_would_be_seen(tmp_path):
    """The twin: read without `weights_only`, the file of the test above does run code."""
    torch.save(Evil(tmp_path / "ran"), tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=False).close()
    assert (tmp_path / "ran").exists()


def _paths(value, path=(), depth=5):
    yield path
    if depth and isinstance(value, dict):
        for key in value:
            yield from _paths(value[key], (*path, key), depth - 1)
    elif depth and isinstance(value, list) and value:
        yield from _paths(value[0], (*path, 0), depth - 1)


@pytest.mark.parametrize("change", ["left out", "null", "text", "list", "true"])
def test_results_of_another_format_are_refused_or_gone_on_with(
    whole, tmp_path, monkeypatch, change
):
    """Every part of results.json in turn: older formats, other tools, hands."""
    monkeypatch.setattr(results.os, "fsync", lambda descriptor: None)
    original = content_of(whole)
    config = original["config"] = {**original["config"], "methods": {"none": None}}
    original["methods"] = {"none": original["methods"]["none"]}
    text = json.dumps(original)
    file, refused, other = tmp_path / "results.json", 0, []
    for path in _paths(original):
        content = json.loads(text)
        value = {"null": None, "text": "x", "list": [], "true": True, "left out": {}}[change]
        if not path:
            content = value
        else:
            *above, last = path
            inner = functools.reduce(lambda value, key: value[key], above, content)
            if change == "left out":
                del inner[last]
            else:
                inner[last] = value
        file.write_text(json.dumps(content))
        message = ""
        try:
            found = Results(tmp_path, config, resume=True)
        except UserError as error:
            message = str(error)
        if message:
            refused += 1
            assert "results.json" in message or "of another configuration" in message
            assert file.read_text() == json.dumps(content)
            continue
        found.finished("none", 0)
        found.save(complete=True)
        if found.content["methods"] != original["methods"]:
            other.append(path)
            table(found.content)
            write_report(found.content, tmp_path / "report.html")
    assert refused > 40
    assert len(other) < 20


# --- a disk that is full


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_one_line_that_names_the_place_and_loses_nothing(whole, tmp_path):
    """No file may grow beyond 100 kB: the results fit, a checkpoint does not."""
    import resource

    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            UserError,
            match=r"cannot write in '.*out/runs/none-0' \(.*\); make room, then go on with --res",
        ):
            _run(_small(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert content_of(out)["costs"]["0"]
    again = _run(_small(out, resume=True))
    assert without_clocks(again) == without_clocks(content_of(whole))
