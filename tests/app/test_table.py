from __future__ import annotations

import pytest
from finished_results import as_text, finished_content

from torchdrop.app.methods import METHODS
from torchdrop.app.table import WIDTH, bench_table, cells, table


@pytest.fixture
def content(tmp_path):
    return finished_content(tmp_path)


def test_table_is_whole_at_its_width(content):
    assert 100 <= WIDTH <= 110
    content["methods"]["cutout"]["mean"]["observed_p"] = 1.0
    content["methods"]["cutout"]["asked_p"] = 1.0
    text = as_text(table(content), WIDTH)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "100.0 (100.0)" in text
    assert "12.35" in text or "12.34" in text
    for name in METHODS:
        assert name in text
    assert "20.00 ± 14.14" in text  # percent
    assert "12.3 (27.8)" in text


def test_table_without_seeds_to_spread_has_no_spread(content):
    for method in content["methods"].values():
        method["std"]["test_error"] = None
    assert "±" not in as_text(table(content), 100).split("\n", 1)[1]


def test_results_of_an_older_version_have_no_shift(content):
    for method in content["methods"].values():
        del method["variance_shift"]
    assert {row[-1] for row in cells(content)} == {"-"}


def _bench_content(mode="row", peak=3 * 2**20):
    ms = {"n": 3, "mean": 12.34, "median": 10.04, "low": 9.96, "high": 20.0}
    figures = {
        "ms": ms,
        **{f"{key}_over_dense": 0.5 for key in ("time", "flops", "bytes")},
        "peak_bytes": peak,
        "observed_p": 0.25,
    }
    config = {"model": "[b]net", "batch": 4, "size": 8, "mode": mode, "p": 0.5}
    return {
        "config": {**config, "schedule": "linear", "device": "cpu"},
        "contestants": {"dense": figures, "skipping": figures},
    }


@pytest.mark.parametrize(("mode", "typical"), [("row", "10.0"), ("batch", "12.3")])
def test_the_table_of_bench_has_a_row_for_each_variant(mode, typical):
    lines = as_text(bench_table(_bench_content(mode)), WIDTH).splitlines()
    assert f"net, 4 x 8 px, {mode} mode, p=0.5 linear, cpu" in lines[0]
    for name in ("dense", "skipping"):
        (row,) = [line for line in lines if line.split()[:1] == [name]]
        assert row.split() == [name, typical, "10.0", "-", "20.0", *["0.50"] * 3, "3", "25.0"]


def test_a_figure_that_does_not_exist_is_a_dash():
    content = _bench_content(peak=None)
    content["contestants"]["dense"]["flops_over_dense"] = None
    lines = as_text(bench_table(content), WIDTH).splitlines()
    (row,) = [line for line in lines if line.split()[:1] == ["dense"]]
    assert row.split()[-5:] == ["0.50", "-", "0.50", "-", "25.0"]


def test_tables_without_a_terminal_are_plain_text(content):
    text = as_text(table(content), WIDTH) + as_text(bench_table(_bench_content()), WIDTH)
    assert "\x1b" not in text
