from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
from PIL import Image

from torchdrop.app import cli, compare, report
from torchdrop.app.compare import Settings
from torchdrop.app.compare_settings import set_up
from torchdrop.app.errors import UserError
from torchdrop.app.methods import METHODS
from torchdrop.app.results import FIGURES, locked
from torchdrop.app.table import WIDTH

SMALL = [
    "--model=resnet-8",
    "--train-size=40",
    "--test-size=50",
    "--epochs=2",
    "--batch-size=20",
    "--seeds=2",
    "--cost-steps=2",
    "--threads=1",
    "--accelerator=cpu",
]


def _small(out, **changes):
    settings = {
        "model": "resnet-8",
        "train_size": 40,
        "test_size": 50,
        "epochs": 2,
        "batch_size": 20,
        "seeds": 2,
        "cost_steps": 2,
        "threads": 1,
        "accelerator": "cpu",
        "progress": False,
    }
    return Settings(out=out, **{**settings, **changes})


def _silent(line):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole comparison from the command line: its folder and what it printed."""
    out = tmp_path_factory.mktemp("compare") / "out"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(sys, "stdout", _Lines(lines))
        code = cli.main(["compare", *SMALL, "--out", str(out)])
    assert code == 0
    return out, "".join(lines)


class _Lines:
    encoding = "utf-8"

    def __init__(self, lines):
        self.lines = lines

    def write(self, text):
        self.lines.append(text)
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return False


def _content(out):
    return json.loads((out / "results.json").read_text())


def _without_clocks(content):
    """Everything but what depends on clocks."""
    content = json.loads(json.dumps(content))
    del content["costs"]
    for method in content["methods"].values():
        for block in (method["mean"], method["std"], method["ratio"]):
            block.pop("step_ms")
        for seed in method["seeds"]:
            del seed["step_ms"], seed["seconds"]
    return content


def test_every_method_and_seed_is_in_the_results(finished):
    content = _content(finished[0])
    assert content["status"] == "complete"
    assert list(content["methods"]) == list(compare.DEFAULT_METHODS)
    for name, method in content["methods"].items():
        assert [seed["seed"] for seed in method["seeds"]] == [0, 1]
        for figures in (*method["seeds"], method["mean"]):
            assert set(FIGURES) <= set(figures)
            for figure in FIGURES:
                assert (figures[figure] is None) == (name == "none" and figure == "observed_p")


def test_errors_are_fractions_of_the_images(finished):
    for method in _content(finished[0])["methods"].values():
        for seed in method["seeds"]:
            assert (seed["test_error"] * 50) == pytest.approx(round(seed["test_error"] * 50))
            assert (seed["train_error"] * 40) == pytest.approx(round(seed["train_error"] * 40))
            assert 0 <= seed["test_error"] <= 1


def test_costs_are_over_those_of_none(finished):
    methods = _content(finished[0])["methods"]
    ratios = {name: method["ratio"] for name, method in methods.items()}
    assert ratios["none"] == {"step_ms": 1, "flops": 1, "saved_bytes": 1}
    assert ratios["drop_path"]["flops"] == ratios["dropout"]["flops"] == 1
    assert ratios["stochastic_depth_row"]["flops"] < 0.9


def test_subsample_has_the_flops_of_rows(finished):
    methods = _content(finished[0])["methods"]
    rows = methods["stochastic_depth_row"]["seeds"][0]["flops"]
    dense = methods["none"]["seeds"][0]["flops"]
    assert methods["subsample"]["p"] == pytest.approx(1 - rows / dense)
    # Two counted steps of 20 rows: the rounding of a row in 40.
    assert methods["subsample"]["seeds"][0]["flops"] / rows == pytest.approx(1, abs=0.06)


def test_the_table_has_every_method_uncut(finished):
    _, printed = finished
    for name in compare.DEFAULT_METHODS:
        assert name in printed
    assert "…" not in printed
    assert "\x1b" not in printed  # no terminal: plain text
    assert max(map(len, printed.splitlines())) <= WIDTH
    assert "test error" in printed.splitlines()[1]


def test_every_method_has_its_largest_variance_shift(finished):
    for method in _content(finished[0])["methods"].values():
        assert method["variance_shift"] > 0


def test_the_report_is_there(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "Not complete" not in page


def test_nothing_else_is_left_in_the_folder(finished):
    assert sorted(path.name for path in finished[0].iterdir()) == [
        ".lock",
        "report.html",
        "results.json",
    ]


def test_weights_start_alike_for_all_methods(tmp_path):
    setup = set_up(_small(tmp_path))
    results = compare.Results(tmp_path, {})
    comparison = compare._Comparison(_small(tmp_path), setup, results, _silent)
    comparison.source = compare.open_source("digits")
    comparison.p["subsample"] = 0.5
    states = [comparison._build(name, 1)[0].state_dict() for name in setup.methods]
    for state in states:
        assert all((state[key] == value).all() for key, value in states[0].items())
    other = comparison._build("none", 0)[0].state_dict()
    assert not (other["conv1.weight"] == states[0]["conv1.weight"]).all()


# --- the methods that are not run by default


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All methods that have a place in a network with residual blocks, and what was said."""
    said = []
    out = tmp_path_factory.mktemp("all")
    return compare.compare(_small(out, methods=("all",), seeds=1, epochs=1), said.append), said


def test_all_is_every_method_that_has_a_place(everything):
    content, said = everything
    assert list(content["methods"]) == [name for name in METHODS if name != "path_drop"]
    assert said[0].startswith("left out, since resnet-8 has no place for them: path_drop (ask for")
    for name, method in content["methods"].items():
        nothing_dropped = name in {"none", "gaussian_dropout", "uniform_dropout"}
        for figure in FIGURES:
            assert (method["mean"][figure] is None) == (nothing_dropped and figure == "observed_p")
        assert method["variance_shift"] > 0


def test_methods_that_compute_everything_cost_the_flops_of_none(everything):
    methods = everything[0]["methods"]
    cheaper = {"stochastic_depth_row", "stochastic_depth_batch", "subsample"}
    for name, method in methods.items():
        assert (method["ratio"]["flops"] == 1) == (name not in cheaper)


def test_a_fractal_net_is_compared_with_what_it_has_a_place_for(tmp_path):
    settings = _small(tmp_path / "a", model="fractalnet", seeds=1, epochs=1)
    content = compare.compare(settings, _silent)
    assert list(content["methods"]) == ["none", "dropout", "path_drop"]
    assert content["methods"]["path_drop"]["mean"]["observed_p"] > 0.1
    setup = set_up(_small(tmp_path, model="fractalnet", methods=("all",)))
    assert setup.methods == [
        *("none", "dropout", "dropout_before_bn", "dropout_after_bn", "cutout", "path_drop")
    ]
    assert "subsample" in setup.left_out  # it has the FLOPs of a method that is


def test_results_of_a_version_without_the_shift_are_gone_on_with(finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    content = _content(out)
    for method in content["methods"].values():
        del method["variance_shift"]
        method["seeds"] = [seed for seed in method["seeds"] if seed["seed"] == 0]
    content["status"] = "partial"
    (out / "results.json").write_text(json.dumps(content))
    assert cli.main(["compare", *SMALL, "--out", str(out), "--resume"]) == 0
    again = _content(out)
    assert again["status"] == "complete"
    # Seed 0, which it is measured on, was trained by the older version.
    assert all("variance_shift" not in method for method in again["methods"].values())
    assert "largest" in capsys.readouterr().out


def test_a_method_that_no_forward_comes_by_is_refused(tmp_path, monkeypatch):
    """A hook on modules that the network does not call would silently do nothing."""
    (tmp_path / "by_hand.py").write_text(
        "import torch\n"
        "class Block(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = torch.nn.Linear(64, 64)\n"
        "    def forward(self, x):\n"
        "        return x + self.fc(x).relu()\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.blocks = torch.nn.ModuleList([Block(), Block()])\n"
        "    def forward(self, x):\n"
        "        x = x.flatten(1)\n"
        "        for block in self.blocks:\n"
        "            x = block.forward(x)\n"
        "        return x[:, :10]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = _small(tmp_path / "out", model="by_hand:Net", methods=("spatial_dropout",))
    with pytest.raises(
        UserError, match=r"spatial_dropout changed nothing .* leave spatial_dropout"
    ):
        compare.compare(settings, _silent)
    sys.modules.pop("by_hand", None)


# --- refusing, stopping, going on


def test_finished_results_are_refused_and_resumed(finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    before = _content(out)
    assert cli.main(["compare", *SMALL, "--out", str(out)]) == 2
    assert "give --resume" in capsys.readouterr().err
    assert cli.main(["compare", *SMALL, "--out", str(out), "--resume"]) == 0
    assert _content(out) == before
    other = [*SMALL, "--epochs=3", "--out", str(out), "--resume"]
    assert cli.main(["compare", *other]) == 2
    assert "recipe.epochs is 2 there, 3 here" in capsys.readouterr().err
    assert _content(out) == before


def test_the_folder_is_held_until_the_report_is_written(finished, tmp_path, monkeypatch):
    """Else another comparison may begin there, whose report this one's would replace."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    held, write = [], report.write_report

    def watched(content, path):
        with pytest.raises(UserError, match="another torchdrop is at work"), locked(out):
            pass
        held.append(path)
        write(content, path)

    monkeypatch.setattr(report, "write_report", watched)
    assert cli.main(["compare", *SMALL, "--out", str(out), "--resume"]) == 0
    assert held == [out / "report.html"]
    with locked(out):  # and no longer
        pass


def test_a_report_that_cannot_be_written_loses_nothing_else(finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    before = _content(out)
    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    assert cli.main(["compare", *SMALL, "--out", str(out), "--resume"]) == 2
    captured = capsys.readouterr()
    assert "stochastic_depth_batch" in captured.out
    assert re.search(r"error: cannot write '.*report\.html' \(.*\); make room", captured.err)
    assert _content(out) == before


def test_results_that_were_stopped_end_like_those_that_were_not(tmp_path, monkeypatch):
    settings = _small(tmp_path / "part", methods=("stochastic_depth_batch", "subsample"))
    whole = compare.compare(_small(tmp_path / "whole", methods=settings.methods), _silent)
    real, runs = compare.train, []

    def stops(run, resume=False):
        runs.append(run.label)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return real(run, resume)

    monkeypatch.setattr(compare, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(settings, _silent)
    part = _content(settings.out)
    assert part["status"] == "partial"
    assert sum(len(method["seeds"]) for method in part["methods"].values()) == 3
    again = compare.compare(_small(**{**vars(settings), "resume": True}), _silent)
    assert len(runs) == 4 + 3  # what is finished is not run again
    assert _without_clocks(again) == _without_clocks(whole)


def test_no_space_in_the_middle_keeps_what_was_finished(tmp_path, monkeypatch):
    settings = _small(tmp_path, methods=("dropout",), seeds=1)
    real = compare.Results.save

    def full(self, complete=False):
        if self.content["methods"].get("dropout", {}).get("seeds"):
            raise UserError("cannot write: No space left on device")
        real(self, complete)

    monkeypatch.setattr(compare.Results, "save", full)
    with pytest.raises(UserError, match="No space"):
        compare.compare(settings, _silent)
    monkeypatch.undo()
    assert len(_content(tmp_path)["methods"]["none"]["seeds"]) == 1
    again = compare.compare(_small(**{**vars(settings), "resume": True}), _silent)
    assert again["status"] == "complete"


# --- bad input: one line, exit code 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=none,shake"], "no method 'shake'; the methods are none, dropout, drop_path"),
        (["--methods=path_drop"], "joins of a FractalNet; give --model fractalnet"),
        (
            ["--model=fractalnet", "--methods=drop_block"],
            "this one has none that torchdrop.find_re",
        ),
        (["--methods=gaussian_dropout", "--p=1"], "gaussian_dropout: p has to be below 1"),
        (["--model=vgg16"], "no model 'vgg16'; give resnet-N"),
        (["--model=resnet-21"], "the nearest is resnet-20"),
        (["--model=torchvision:resnet99"], "no classifier 'resnet99'"),
        (["--model=no_such_module:net"], "importing 'no_such_module' failed"),
        (["--data=cifar"], "no data 'cifar'; give digits"),
        (["--data=folder:/no/such"], "no folder '/no/such'"),
        (["--p=1.5"], "p has to be a number between 0 and 1"),
        (["--p=dropout=-1"], "p has to be a number between 0 and 1"),
        (["--p=cutout=.1"], "'cutout' is not among the methods compared"),
        (["--preset=paper"], "no preset 'paper'; choose one of paper-cifar10"),
        (["--train-size=5"], "--train-size 5 has to be between the number of classes"),
        (["--train-size=5000"], "images to train on, but 5000 training images"),
        (["--epochs=0"], "--epochs has to be 1 or more, but got 0"),
        (["--seeds=0"], "--seeds has to be 1 or more"),
        (["--lr=0"], "--lr has to be a positive number"),
        (["--augment=mixup"], "no augmentation 'mixup'; choose one of none, shift, flip-shift"),
        (["--epochs=many"], "See torchdrop --help"),
        (["--no-such-option"], "See torchdrop --help"),
        (["--model=torchvision:vgg11", "--methods=stochastic_depth_row"], "residual"),
        (["--model=torchvision:vgg11", "--methods=none"], "try another --image-size"),
        (["--accelerator=warp"], "accelerator"),
        (["--precision=3"], "precision"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    code = cli.main(["compare", *SMALL, "--out", str(tmp_path / "out"), *arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("torchdrop: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["compare", *SMALL, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write in" in capsys.readouterr().err


def test_an_unreadable_image_is_one_line_before_anything_is_trained(tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for index in range(4):
            Image.new("L", (9, 9), index).save(tmp_path / label / f"{index}.png")
    (tmp_path / "dog" / "9.jpg").write_text("no image")
    out = tmp_path / "out"
    code = cli.main(["compare", f"--data=folder:{tmp_path}", "--out", str(out)])
    assert code == 2
    assert "9.jpg" in capsys.readouterr().err
    assert not (out / "results.json").exists()


def test_a_folder_of_images_is_compared(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (9, 9), (index, 0, 0)).save(tmp_path / "data" / label / f"{index}.png")
    settings = _small(
        tmp_path / "out",
        data=f"folder:{tmp_path / 'data'}",
        methods=("stochastic_depth_row",),
        train_size=None,
        test_size=None,
        image_size=8,
        seeds=1,
    )
    assert compare.compare(settings, _silent)["status"] == "complete"


def test_gray_images_go_through_a_torchvision_model(tmp_path):
    settings = _small(
        tmp_path,
        model="torchvision:resnet18",
        methods=("stochastic_depth_row",),
        image_size=32,
        epochs=1,
        seeds=1,
        cost_steps=1,
    )
    content = compare.compare(settings, _silent)
    assert content["methods"]["stochastic_depth_row"]["mean"]["flops"] > 0


def test_none_is_always_run_and_said(tmp_path):
    said = []
    content = compare.compare(
        _small(tmp_path, methods=("dropout",), seeds=1, epochs=1), said.append
    )
    assert list(content["methods"]) == ["none", "dropout"]
    assert said[0].startswith("none is run too")


def test_options_override_the_preset(tmp_path):
    settings = Settings(
        out=tmp_path,
        preset="paper-cifar10",
        model="resnet-8",
        data="digits",
        train_size=40,
        val_size=20,
        test_size=50,
        epochs=3,
        batch_size=20,
        seeds=1,
        cost_steps=1,
        accelerator="cpu",
        progress=False,
    )
    content = compare.compare(settings, _silent)
    for method in content["methods"].values():
        (seed,) = method["seeds"]
        errors = seed["curves"]["val_error"]
        # Test error at the epoch of the lowest validation error, the first of several.
        assert seed["epoch"] == errors.index(min(errors)) + 1
        assert seed["test_error"] == seed["curves"]["test_error"][seed["epoch"] - 1]
