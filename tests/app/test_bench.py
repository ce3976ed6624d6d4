from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import torchdrop
from torchdrop.app import bench, cli, timing
from torchdrop.app.bench import Settings
from torchdrop.app.errors import UserError

CPU = torch.device("cpu")
TINY = ["resnet-8", "--size=8", "--batch=4", "--steps=2", "--threads=1", "--device=cpu"]


def _tiny(out, **changes):
    settings = {"model": "resnet-8", "size": 8, "batch": 4, "steps": 2, "threads": 1}
    return Settings(out=out, **{**settings, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out"
    ticks = []
    found = bench.bench(_tiny(out, p=0.5, schedule="uniform"), lambda *t: ticks.append(t))
    return out, found, ticks


def test_the_file_has_what_was_found(finished):
    out, found, _ = finished
    name = "resnet-8-row-p0.5-uniform-4x8.json"
    assert sorted(path.name for path in out.iterdir()) == [".lock", name]
    content = json.loads((out / name).read_text())
    assert found == {**content, "path": str(out / name)}
    assert content["schema"] == 1
    assert content["config"]["model"] == "resnet-8"
    assert content["config"]["steps"] == 2
    assert content["config"]["device"] == "cpu"
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"processor", "threads", "load"} <= set(content["machine"])
    assert content["branches"] == {"found": 3, "skipped": 3, "mean_p": 0.5}


def test_what_is_skipped_is_not_computed_and_what_is_masked_is(finished):
    dense, masked, skipping = finished[1]["contestants"].values()
    assert dense["flops_over_dense"] == masked["flops_over_dense"] == 1
    # Two of four rows; only the stem and the head see all.
    assert 0.5 < skipping["flops_over_dense"] < 0.56
    assert skipping["bytes_over_dense"] < 1
    assert dense["observed_p"] == 0
    assert masked["observed_p"] == skipping["observed_p"] == 0.5
    for figures in (dense, masked, skipping):
        ms = figures["ms"]
        assert ms["n"] == 2
        assert 0 < ms["low"] <= ms["median"] <= ms["high"]
        over = ms["median"] / dense["ms"]["median"]
        assert figures["time_over_dense"] == pytest.approx(over)
        assert figures["peak_bytes"] > figures["saved_bytes"] / 2


def test_every_stage_and_every_round_is_told(finished):
    told = finished[2]
    names = ("dense", "masked", "skipping")
    assert told[0][0].startswith("making resnet-8")
    assert told[1:4] == [(f"first step, {name}", 0, 4) for name in names]
    timing = [
        (done, total)
        for doing, done, total in told
        if doing.startswith("timing a step of each, 2 times after 2")
    ]
    assert timing == [(done, 4) for done in range(5)]  # as many to warm up as are timed
    assert told[-3:] == [(f"counting FLOPs and bytes, {name}", 4, 4) for name in names]


def test_a_busy_machine_is_told_where_threads_would_wait(monkeypatch):
    monkeypatch.setattr(bench, "_load", lambda: [9.5, 1.0, 1.0])
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    with timing.threads(2):
        assert bench._busy(CPU) == (
            " (load 9.5 on 2 cores: --threads 1 is faster on a busy machine)"
        )
        assert bench._busy(torch.device("cuda")) == ""
        monkeypatch.setattr(bench, "_load", lambda: [1.5, 9.0, 9.0])
        assert bench._busy(CPU) == ""
    monkeypatch.setattr(bench, "_load", lambda: [9.5, 1.0, 1.0])
    with timing.threads(1):
        assert bench._busy(CPU) == ""


def test_lightning_is_not_loaded_to_time_a_step():
    """It takes longer to import than torch."""
    code = "import sys, torchdrop.app.{}; print('lightning' in sys.modules)"
    for module, loaded in (("bench", "False"), ("training", "True")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == loaded


def test_batch_mode_counts_the_steps_that_it_times(tmp_path):
    settings = _tiny(tmp_path, mode="batch", p=0.9, schedule="uniform", steps=4)
    found = bench.bench(settings)
    skipping = found["contestants"]["skipping"]
    # The very decisions: step n draws from seed n.
    model = bench.open_model("resnet-8").build(10, 3).train()
    plan = torchdrop.add_stochastic_depth(model, 0.9, schedule="uniform", mode="batch")
    for seed in range(4):
        torch.manual_seed(seed)
        model(torch.zeros(4, 3, 8, 8))
    observed = sum(plan.observed().values()) / 3
    assert skipping["observed_p"] == pytest.approx(observed)
    mean = skipping["ms"]["mean"] / found["contestants"]["dense"]["ms"]["mean"]
    assert skipping["time_over_dense"] == pytest.approx(mean)


def test_masks_that_a_network_has_do_not_act_in_dense(tmp_path, monkeypatch):
    (tmp_path / "masked_net.py").write_text(
        "import torch, torchvision\n"
        "class Block(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.branch = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())\n"
        "        self.drop = torchvision.ops.StochasticDepth(1.0, 'row')\n"
        "    def forward(self, x):\n"
        "        return x + self.drop(self.branch(x))\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.blocks = torch.nn.ModuleList([Block(), Block()])\n"
        "        self.fc = torch.nn.Linear(8, 10)\n"
        "    def forward(self, x):\n"
        "        x = x.mean((1, 2))\n"
        "        for block in self.blocks:\n"
        "            x = block(x)\n"
        "        return self.fc(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = _tiny(tmp_path / "out", model="masked_net:Net", p=0.0)
    subjects = bench._subjects(settings, CPU)
    outs = [subject.model(subject.images) for subject in subjects.values()]
    sys.modules.pop("masked_net", None)
    assert torch.equal(outs[0], subjects["dense"].model.eval()(subjects["dense"].images))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_all_start_from_the_same_weights_in_the_format_that_was_asked_for(tmp_path):
    subjects = bench._subjects(_tiny(tmp_path, channels_last=True), CPU)
    states = [subject.model.state_dict() for subject in subjects.values()]
    for key, value in states[0].items():
        assert all(torch.equal(state[key], value) for state in states)
    images = subjects["skipping"].images
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert states[0]["conv1.weight"].is_contiguous(memory_format=torch.channels_last)


def test_compiled_networks_are_run_and_plain_ones_counted(tmp_path, monkeypatch):
    compiled = []

    class Compiled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.calls = model, 0

        def forward(self, x):
            self.calls += 1
            return self.model(x)

    def compile_(model):
        compiled.append(Compiled(model))
        return compiled[-1]

    monkeypatch.setattr(torch, "compile", compile_)
    bench.bench(_tiny(tmp_path, compile=True))
    # The first step, the warm-up, two timed steps, and those whose memory is measured.
    assert [net.calls for net in compiled] == [1 + 2 + 2 + 2] * 3
    assert (tmp_path / "resnet-8-row-p0.2-linear-4x8-compile.json").exists()


def _content(skipping, masked=1.0, flops=0.7, noisy=False, skipped=3):
    ms = {"median": 10.0, "low": 9.0 if noisy else 9.9, "high": 11.0 if noisy else 10.1}
    return {
        "config": {"mode": "row"},
        "branches": {"found": 3, "skipped": skipped},
        "contestants": {
            "dense": {"ms": ms},
            "masked": {"time_over_dense": masked},
            "skipping": {"time_over_dense": skipping, "flops_over_dense": flops},
        },
    }


@pytest.mark.parametrize(
    ("content", "said", "not_said"),
    [
        (_content(0.75), "takes 0.75 of the time of dense steps for 0.70 of their FLOPs", "pay"),
        (_content(1.2), "does not pay here", "vary"),
        (_content(1.0, flops=1.0), "masking takes 1.00", "pay"),
        (_content(0.8, noisy=True), "times vary a lot", "masked;"),
        (_content(0.9, skipped=1), "Of 3 branches, 1 are skipped and the others masked", "vary"),
    ],
)
def test_the_finding_says_what_was_found(content, said, not_said):
    finding = bench._finding(content)
    assert said in finding
    assert not_said not in finding


# --- the command line


def test_the_command_prints_a_table_the_finding_and_the_place(tmp_path, capsys):
    assert cli.main(["bench", *TINY, "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    for word in ("dense", "masked", "skipping", "FLOPs", "resnet-8, 4 x 8 px, row mode, p=0.2"):
        assert word in captured.out
    assert "Skipping takes" in captured.out
    assert "resnet-8-row-p0.2-linear-4x8.json" in captured.out.replace("\n", "")
    told = captured.err.splitlines()  # no terminal: a line a stage
    assert [line.split()[0] for line in told] == [
        "making",
        *["first"] * 3,
        "timing",
        *["counting"] * 3,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch=0"], "--batch has to be 1 or more, but got 0"),
        (["--steps=-1"], "--steps has to be 1 or more"),
        (["--threads=0"], "--threads has to be 1 or more"),
        (["--size=0"], "--size has to be 1 or more"),
        (["--p=1.5"], "--p has to be between 0 and 1, but got 1.5"),
        (["--p=nan"], "--p has to be between 0 and 1"),
        (["--p=half"], "See torchdrop --help"),
        (["--mode=rows"], "--mode has to be one of"),
        (["--schedule=cubic"], "--schedule has to be one of 'linear'"),
        (["--device=gpu"], "'gpu' is not a device that torch knows"),
        (["--device=meta"], "this machine has none; choose one of cpu"),
        (["fractalnet"], "See torchdrop --help"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert cli.main(["bench", *TINY, *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("torchdrop: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet19"}, "neither torchvision nor timm has a model 'resnet19'; did you"),
        ({"model": "resnet-9"}, "the nearest is resnet-8"),
        ({"model": "no_such:net"}, "importing 'no_such' failed"),
        ({"model": "fractalnet"}, "fractalnet: no residual branches found"),
        ({"model": "vit_b_16", "size": 33}, "does not run on images of 33 px"),
        ({"model": "resnet18", "size": 8, "batch": 1}, "resnet18, dense, fails on a batch of 1 x"),
    ],
)
def test_a_model_that_cannot_be_measured_is_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        bench.bench(_tiny(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_without_timm_its_pip_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'torchdrop\[timm\]'"):
        bench.bench(_tiny(tmp_path, model="vit_tiny_patch16_224"))


def test_a_network_of_timm_takes_the_size_that_was_asked_for():
    net, side = bench._network("test_vit", 32)
    assert side == 32
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    assert bench._network("test_vit", None)[1] == 160


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"):
        bench.bench(_tiny(tmp_path / "file" / "out"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    import resource

    nothing = {name: {"ms": {}, "peak_bytes": None} for name in bench.CONTESTANTS}
    monkeypatch.setattr(bench, "_measure", lambda *args: nothing)
    monkeypatch.setattr(bench, "_finding", lambda content: "x" * 2000)
    path = tmp_path / "resnet-8-row-p0.2-linear-4x8.json"
    path.write_text("of an earlier day")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write '.*4x8\.json' \(.*\); make room or"):
            bench.bench(_tiny(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "of an earlier day"
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", path.name]
    bench.bench(_tiny(tmp_path))  # with room, whatever is there is written anew
    assert json.loads(path.read_text())["finding"] == "x" * 2000


def test_one_image_is_enough_without_batch_norm(tmp_path, monkeypatch):
    (tmp_path / "normless_net.py").write_text(
        "from torch import nn\n"
        "class Block(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)\n"
        "    def forward(self, x):\n"
        "        return x + self.norm(self.conv(x)).relu()\n"
        "def net():\n"
        "    body = [nn.Conv2d(3, 4, 3, 4), Block(), Block(), nn.AdaptiveAvgPool2d(1)]\n"
        "    return nn.Sequential(*body, nn.Flatten(), nn.Linear(4, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = bench.bench(_tiny(tmp_path / "out", model="normless_net:net", batch=1, p=0.9, steps=1))
    sys.modules.pop("normless_net", None)
    assert found["contestants"]["dense"]["ms"]["n"] == 1
    assert found["branches"]["skipped"] == 2
