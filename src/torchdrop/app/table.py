"""The tables of ``compare`` and ``bench`` in the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

__all__ = ["COLUMNS", "WIDTH", "bench_table", "cells", "table"]

WIDTH = 104
"""The width in characters that a table needs."""

# Headers of two lines, so that a row fits in WIDTH.
COLUMNS = (
    "method",
    "test\nerror %",
    "train\nerror %",
    "test\nNLL",
    "step\n/ none",
    "FLOPs\n/ none",
    "bytes\n/ none",
    "dropped %\n(asked)",
    "largest\nshift",
)


def cells(content: dict[str, Any]) -> list[list[str]]:
    """Return the cells of each row of the table, from the content of results.json."""
    rows = []
    for name, entry in content["methods"].items():
        mean, std, ratio = entry["mean"], entry["std"], entry["ratio"]
        error = _percent(mean["test_error"])
        if std["test_error"] is not None:
            error += f" ± {_percent(std['test_error'])}"
        dropped = _percent(mean["observed_p"], 1)
        if mean["observed_p"] is not None:
            dropped += f" ({_percent(entry['asked_p'], 1)})"
        rows.append(
            [
                name,
                error,
                _percent(mean["train_error"]),
                _number(mean["test_nll"], 3),
                *(_number(ratio[key], 2) for key in ("step_ms", "flops", "saved_bytes")),
                dropped,
                # Results of older versions lack it.
                _number(entry.get("variance_shift"), 2),
            ]
        )
    return rows


def _percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(content: dict[str, Any]) -> Table:
    """Return the table of ``torchdrop compare``, at most WIDTH characters wide."""
    seeds = content["config"]["seeds"]
    config = content["config"]
    over = f"mean ± std over {seeds} seeds" if seeds > 1 else "one seed"
    result = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        # As Text, here and in the rows, since a name may look like rich's markup.
        title=Text(f"{config['model']} on {config['data']}, {over}", style="table.title"),
    )
    for index, name in enumerate(COLUMNS):
        result.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in cells(content):
        result.add_row(*map(Text, row))
    return result


def bench_table(content: dict[str, Any]) -> Table:
    """Return the table of ``torchdrop bench``."""
    config = content["config"]
    result = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        title=f"{config['model']}, {config['batch']} x {config['size']} px, {config['mode']} mode, "
        f"p={config['p']:g} {config['schedule']}, {config['device']}",
    )
    columns = ("", "step ms", "quartiles", "time\n/ dense", "FLOPs\n/ dense", "bytes\n/ dense")
    for index, name in enumerate((*columns, "peak\nMiB", "dropped %")):
        result.add_column(name, justify="right" if index else "left", no_wrap=True)
    typical = "mean" if config["mode"] == "batch" else "median"
    for name, figures in content["contestants"].items():
        ms, peak = figures["ms"], figures["peak_bytes"]
        result.add_row(
            name,
            f"{ms[typical]:.1f}",
            f"{ms['low']:.1f} - {ms['high']:.1f}",
            *(_number(figures[f"{key}_over_dense"], 2) for key in ("time", "flops", "bytes")),
            _number(None if peak is None else peak / 2**20, 0),
            _percent(figures["observed_p"], 1),
        )
    return result
