"""The peers do what they are said to do, the benchmarks go on where they ended, tables are made."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import ResNet

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
peers = pytest.importorskip("peers", reason="timm")
scale = pytest.importorskip("scale")
accelerator = pytest.importorskip("accelerator")
compiled = pytest.importorskip("compiled")
import_time = pytest.importorskip("import_time")
reliability = pytest.importorskip("reliability")
steps = pytest.importorskip("steps")

SPEC = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)

from torchdrop.app.models import CifarResNet  # noqa: E402
from torchdrop.cost import flops  # noqa: E402


def _networks():
    vit = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
    images = torch.randn(6, 3, 32, 32)
    small = peers.create_model(
        "convnext_atto", depths=(1, 1, 1, 1), dims=(8,) * 4, ls_init_value=1.0
    )
    return {
        "vit": (peers.create_model("vit_tiny_patch16_224", **vit), images),
        "convnext": (small, images),
        "resnet50": (ResNet(peers.Bottleneck, [1, 1, 1, 1]), images),
        "cifar": (CifarResNet(8), images),
        "encoder": (peers.Encoder(tokens=5, depth=2), torch.randint(1000, (6, 5))),
    }


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("add", ["add_masks", "add_subsets"])
@pytest.mark.parametrize("name", ["vit", "convnext", "resnet50", "cifar", "encoder"])
def test_without_dropping_a_peer_is_the_network_and_with_p_1_its_skips(name, add, mode):
    model, x = _networks()[name]
    model.train()
    blocks = peers.blocks_of(model)
    assert len(blocks) in (2, 3, 4)
    dense = model(x)
    none, every = copy.deepcopy(model), copy.deepcopy(model)
    getattr(peers, add)(none, [0.0] * len(blocks), mode)
    assert torch.allclose(none(x), dense, atol=1e-5)
    getattr(peers, add)(every, [1.0] * len(blocks), mode)
    cheaper = flops(every, x) < 0.7 * flops(model, x)
    assert cheaper == (add == "add_subsets")
    assert not torch.allclose(every(x), dense, atol=1e-4)


def test_a_subset_has_the_mean_of_the_rows_that_were_asked_for():
    torch.manual_seed(0)
    x, seen = torch.ones(5, 3), []

    def branch(rows):
        seen.append(len(rows))
        return rows

    total = sum(peers.add_rows(x, 0 * x, branch, 0.3) for _ in range(2000)) / 2000
    assert set(seen) == {3, 4}  # 3.5 rows
    assert torch.allclose(total, x, atol=0.06)


def test_every_row_names_blocks_that_its_network_has():
    for row in steps.ROWS:
        assert len(row.rates) == {"vit": 12, "conv": 12, "resnet50": 16, "resnet110": 54}.get(
            row.name.partition("-")[0].removesuffix("next"), 24
        )
        assert max(row.rates) == pytest.approx(row.p)
    assert isinstance(steps.ROWS[0].model("dense"), nn.Module)


@pytest.fixture
def tiny(monkeypatch):
    """The benchmark with two rows of a network that takes milliseconds."""
    monkeypatch.setitem(steps.NETWORKS, "tiny", lambda: CifarResNet(8))
    rows = [
        steps.Row("tiny", "tiny", 4, 8, "row", 0.5, "uniform", 0.1),
        steps.Row("tiny-batch", "tiny", 4, 8, "batch", 0.5, "linear", 1.0, above_flops=False),
    ]
    monkeypatch.setattr(steps, "ROWS", rows)
    peak = {name: {"before": 1.0, "peak": 2.0} for name in steps.CONTESTANTS}
    monkeypatch.setattr(steps, "measure_memory", lambda row, threads: peak)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return rows


def _run(monkeypatch, out, *arguments):
    command = ["steps.py", "--steps", "3", "--batch-steps", "4", "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    steps.main()
    return json.loads(out.read_text())["rows"]


def test_a_row_goes_on_where_the_budget_ended_and_becomes_a_line_of_the_table(
    tiny, monkeypatch, tmp_path
):
    out = tmp_path / "steps.json"
    begun = _run(monkeypatch, out, "--budget", "0")
    assert list(begun) == ["tiny"]
    assert not begun["tiny"]["complete"]
    assert begun["tiny"]["n"] == 1
    rows = _run(monkeypatch, out)
    assert [entry["n"] for entry in rows.values()] == [3, 4]
    assert rows["tiny"]["ms"]["dense"][0] == begun["tiny"]["ms"]["dense"][0]
    assert [piece["from"] for piece in rows["tiny"]["pieces"]] == [0, 1]
    for entry in rows.values():
        assert entry["complete"]
        assert entry["time_over_dense"]["dense"] == 1
        assert entry["bytes_over_dense"]["masked"] == pytest.approx(1, abs=0.01)
    flops_, kept = rows["tiny"]["flops_over_dense"], rows["tiny"]["bytes_over_dense"]
    assert flops_["subset"] == flops_["torchdrop"] < 0.56
    assert rows["tiny"]["bar"] == flops_["torchdrop"] + 0.1
    assert 0 < kept["every branch dropped"] < kept["torchdrop"] < 1
    assert rows["tiny-batch"]["bar"] == 1
    assert rows["tiny-batch"]["flops_over_dense"]["subset"] == pytest.approx(
        rows["tiny-batch"]["flops_over_dense"]["torchdrop"]  # the same draws
    )
    page = hooks.with_tables("a\n<!-- table: steps -->\nb", tmp_path)
    lines = page.splitlines()
    assert lines[3].startswith("| tiny, 4 x 8 | row, 0.5 uniform | 3 |")
    assert lines[4].startswith("| tiny, 4 x 8 | batch, 0.5 linear | 4 |")
    assert f"| **{rows['tiny']['time_over_dense']['torchdrop']:.2f}** |" in lines[3]
    assert f"torch {torch.__version__.partition('+')[0]}" in page


def test_a_row_of_other_code_begins_anew(tiny, monkeypatch, tmp_path):
    out = tmp_path / "steps.json"
    before = _run(monkeypatch, out, "--only", "tiny")
    assert _run(monkeypatch, out, "--only", "tiny") == before
    monkeypatch.setattr(steps, "digest", lambda: "other")
    after = _run(monkeypatch, out, "--only", "tiny")
    assert after["tiny"]["ms"] != before["tiny"]["ms"]
    assert len(after["tiny"]["pieces"]) == 1


def test_the_growth_is_measured_and_becomes_tables(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "BLOCKS", (2, 4))
    monkeypatch.setattr(scale, "DEPTHS", (8,))
    monkeypatch.setattr(scale, "BATCHES", (2,))
    monkeypatch.setattr(scale, "SIZES", {"elementwise": [(4, 1, 8)], "mlp": [(4, 2, 8)]})
    monkeypatch.setitem(
        scale.PARTS, "batch", lambda options: scale.grow("batch", [(8, 2)], options)
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    out = tmp_path / "scale.json"
    monkeypatch.setattr(sys, "argv", ["scale.py", "--steps", "2", "--out", str(out)])
    scale.main()
    content = json.loads(out.read_text())
    (depth,) = content["depth"]["cases"]
    assert depth["flops_over_dense"]["row"] < 0.6
    overhead = content["overhead"]["cases"][1]["microseconds"]
    assert set(overhead) == {"row", "batch", "row, chosen"}
    left_out = [case["multiply-adds left out"] for case in content["choice"]["cases"]]
    assert left_out == pytest.approx([0, 0, 0.1 * 8 * 8 * 64, 0.5 * 8 * 8 * 64])
    page = hooks.with_tables(
        "".join(f"<!-- table: {name} -->\n\n" for name in ("overhead", "choice", "depth", "batch")),
        tmp_path,
    )
    assert "| blocks | row, µs | row, as chosen, µs | batch, µs |" in page
    assert "\n| mlp, 4 x 2 x 8 | 0.5 | 32 | 2.0e+03 |" in page
    assert "\n| 8 | " in page


def test_training_in_a_graph_is_counted_and_becomes_a_table(monkeypatch, tmp_path):
    row = compiled.Row("torchvision", "resnet18", 8, 32)
    monkeypatch.setattr(compiled, "STEPS", 3)
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    found = compiled.measure(row, 1)
    assert found["training"] == [1, 0, 0]
    assert found["evaluation"] == 1
    assert found["off by"] == 0.0
    assert found["flops_over_dense"] < 0.7
    about = {"versions": {"torch": "2"}, "clock": "wall", "threads": 1}
    about["machine"] = {"processor": "a"}
    entry = {**found, "row": {"batch": 8, "size": 32}, "conditions": about, "load before": [0.5]}
    content = {"rows": {"resnet18": entry, "other": {**entry, "failed": ["no memory"]}}}
    (tmp_path / "compiled.json").write_text(json.dumps(content))
    page = hooks.with_tables("<!-- table: compiled -->", tmp_path)
    assert "\n| resnet18, 8 x 32 | 1 | 0 | 1 | 0.0e+00 | " in page
    assert "\n| other, 8 x 32 | failed: no memory |" in page
    torch._dynamo.reset()


def test_what_bench_writes_is_collected_and_becomes_a_table(monkeypatch, tmp_path, capsys):
    small = {"model": "resnet-8", "batch": 4, "steps": 1}
    monkeypatch.setattr(accelerator, "ROWS", [{**small, "model": "resnet-7"}, {**small, "p": 0.5}])
    out = tmp_path / "accelerator.json"
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--device", "cpu", "--out", str(out)])
    accelerator.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["config"]["device"] == "cpu"
    assert row["contestants"]["skipping"]["flops_over_dense"] < 1
    assert str(tmp_path.parent) not in out.read_text()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("resnet-7: ")
    assert second.startswith("resnet-8: Skipping takes")
    page = hooks.with_tables("<!-- table: accelerator -->", tmp_path)
    assert "\n| resnet-8, 4 x 32 | row, 0.5 linear | " in page


def test_the_time_of_imports_is_written_with_what_torchdrop_adds(monkeypatch, tmp_path, capsys):
    seconds = iter(range(1, 100))

    def run(code, environment):
        assert "PYTHONDONTWRITEBYTECODE" not in environment
        extra = 2.0 if "torchdrop" in code else 0.0
        return {"wall": 10.0 + extra + next(seconds) % 2, "cpu": 8.0 + extra / 2}

    monkeypatch.setattr(import_time, "run", run)
    monkeypatch.setattr(import_time, "heavy_modules", list)
    out = tmp_path / "import_time.json"
    monkeypatch.setattr(sys, "argv", ["import_time.py", "--runs", "3", "--out", str(out)])
    import_time.main()
    found = json.loads(out.read_text())
    assert found["seconds"]["cpu"]["added"] == {"median": 0.125, "least": 0.125}
    assert len(found["seconds"]["wall"]["torch"]["all"]) == 3
    assert found["about"]["command"].endswith("--runs 3")
    assert str(tmp_path.parent) not in out.read_text()
    assert "cpu  torchdrop adds        median 12.5%" in capsys.readouterr().out


def test_a_program_is_timed_in_a_process_of_its_own():
    taken = import_time.run("import time; time.sleep(0.3)", {})
    assert taken["wall"] >= 0.3
    assert 0.0 < taken["cpu"] < taken["wall"]


def test_composed_models_are_counted_and_become_tables(monkeypatch, tmp_path, capsys):
    out, lines = tmp_path / "reliability.json", tmp_path / "lines.jsonl"
    command = ["reliability.py", "--blocks", "4", "--results", str(lines), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    reliability.main()
    content = json.loads(out.read_text())
    assert content["models"] == 4
    for counts in content["totals"].values():
        assert sum(counts.values()) == 4
        assert not counts.keys() & set(reliability.BROKEN)
    assert "4 models" in capsys.readouterr().out
    before = lines.read_text()
    reliability.main()  # goes on where it ended: nothing is left to do
    assert lines.read_text() == before
    page = hooks.with_tables("<!-- table: composed -->\n\n<!-- table: constructs -->", tmp_path)
    assert "| 4 models | with example_inputs | without |" in page
    assert "| wrong | 0 (0.0%) | 0 (0.0%) |" in page
    assert "| construct | models |" in page


def test_it_does_not_go_on_for_ever_if_no_model_runs(monkeypatch, tmp_path):
    def invalid(waiting):
        for key, _ in waiting:
            yield key, {"invalid": "a reason"}

    monkeypatch.setattr(reliability, "run", invalid)
    command = ["reliability.py", "--blocks", "4", "--results", str(tmp_path / "lines.jsonl")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(RuntimeError, match="none of 4 models runs without torchdrop: a reason"):
        reliability.main()


def test_a_wrong_model_is_counted_as_wrong():
    """The twin: each way in which a model may end has its place in the table."""
    ends = [{"kind": "right", "actions": actions} for actions in (["skip"], ["mask", "skip"])]
    ends += [{"kind": kind, "actions": []} for kind in ("wrong", "raw error", "refused")]
    rows = [{"constructs": ["x + h"], "with example_inputs": e, "without": e} for e in ends]
    rows.append({"constructs": ["x + h"], "without": None, "with example_inputs": None})
    totals = reliability.summary(rows)["totals"]["without"]
    assert totals == dict.fromkeys(
        ("skipped", "masked", "wrong", "raw error", "refused", "died"), 1
    )


def test_the_pages_show_every_table_and_say_what_is_missing(tmp_path):
    pages = [ROOT / "docs" / name for name in ("speed.md", "reliability.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert all(f"<!-- table: {name} -->" in text for name in hooks.TABLES)
    assert hooks.with_tables(text, tmp_path).count("Not measured yet") == len(hooks.TABLES)
    assert "<!-- table" not in hooks.with_tables(text)
