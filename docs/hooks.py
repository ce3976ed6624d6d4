"""Make the pictures of masks and the tables of measurements when the pages are built.

The layers themselves draw the pictures of docs/methods. The tables of docs/speed.md are made from
the files in benchmarks/results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdrop import functional
from torchdrop.schedules import linear, over_time

__all__ = ["PICTURES", "PLOTS", "TABLES", "on_files", "on_page_markdown", "picture", "with_tables"]

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

CELL = 6
GAP = 12
SEED = 20161009


def _colour(value: float) -> str:
    """Return a colour: white for 0, blue for 1, darker above 1, red below 0."""
    if value < 0:
        light = round(255 * (1 - min(-value, 1.0)))
        return f"#ff{light:02x}{light:02x}"
    light = round(255 * (1 - min(value, 1.0) * 0.65 - min(max(value - 1, 0.0), 1.0) * 0.3))
    return f"#{light:02x}{min(255, light + 30):02x}ff" if value <= 1 else f"#00{light:02x}cc"


def _panel(values: Tensor, left: int, top: int, cell: int) -> list[str]:
    """Return rectangles for a matrix of factors, one for each run of equal values in a row."""
    shapes = []
    rows, columns = values.shape
    for r, row in enumerate(values.tolist()):
        start = 0
        for c in range(1, columns + 1):
            if c < columns and _colour(row[c]) == _colour(row[start]):
                continue
            shapes.append(
                f'<rect x="{left + start * cell}" y="{top + r * cell}" '
                f'width="{(c - start) * cell}" height="{cell}" fill="{_colour(row[start])}"/>'
            )
            start = c
    shapes.append(
        f'<rect x="{left}" y="{top}" width="{columns * cell}" height="{rows * cell}" '
        'fill="none" stroke="#888"/>'
    )
    return shapes


def _svg(panels: Sequence[tuple[str, Tensor]], caption: str, cell: int = CELL) -> str:
    """Return panels side by side, each with a label above it, and a caption for screen readers."""
    left, height, shapes = 1, 0, []
    for label, values in panels:
        # At least as wide as the label: letters of 11 pixels are about 6 pixels wide.
        width = max(values.shape[1] * cell, 6 * len(label))
        shapes.append(f'<text x="{left}" y="12">{label}</text>')
        shapes += _panel(values, left, 18, cell)
        left += width + GAP
        height = max(height, values.shape[0] * cell)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left}" height="{height + 20}" '
        f'viewBox="0 0 {left} {height + 20}" role="img" font-family="sans-serif" font-size="11">'
        f"<title>{caption}</title>"
        f'<rect width="{left}" height="{height + 20}" fill="#fff"/>{"".join(shapes)}</svg>\n'
    )


def _samples(mask: Tensor) -> list[tuple[str, Tensor]]:
    return [(f"sample {i}", values) for i, values in enumerate(mask)]


def _drop_path() -> str:
    panels = [
        (f"p={p:.2f}", functional.drop_path(torch.ones(16, 8), p).clamp(max=1))
        for p in linear(0.5, 6)
    ]
    return _svg(panels, "Six blocks: each row is a sample, whole rows are dropped, more with depth")


def _stochastic_depth() -> str:
    rows = torch.stack([functional.drop_path(torch.ones(16), p) for p in linear(0.5, 12)], 1)
    batch = torch.stack(
        [functional.drop_path(torch.ones(16), p, mode="batch") for p in linear(0.5, 12)], 1
    )
    panels = [('mode="row"', rows.clamp(max=1)), ('mode="batch"', batch.clamp(max=1))]
    return _svg(panels, "Columns are 12 blocks, rows 16 samples; white is not computed", 10)


def _drop_block() -> str:
    x = torch.ones(1, 3, 28, 28)
    own = functional.drop_block2d(x, 0.2, 7)[0].clamp(max=1)
    shared = functional.drop_block2d(x, 0.2, 7, per_channel=False)[0].clamp(max=1)
    panels = [(f"channel {i}", values) for i, values in enumerate(own)]
    return _svg(
        [*panels, ("shared", shared[0])], "Blocks of 7x7 are dropped, a fifth of each map", 4
    )


def _spatial_dropout() -> str:
    mask = functional.spatial_dropout(torch.ones(1, 8, 10, 10), 0.5)[0].clamp(max=1)
    panels = [(f"channel {i}", values) for i, values in enumerate(mask)]
    return _svg(panels, "Of eight channels some are dropped whole")


def _noise(change: Callable[[Tensor], Tensor], caption: str) -> str:
    return _svg([("factors", change(torch.ones(12, 26)))], caption, 10)


def _gaussian_dropout() -> str:
    return _noise(
        lambda x: functional.gaussian_dropout(x, 0.2),
        "Factors around 1 with standard deviation 0.5; red ones are below 0",
    )


def _uniform_dropout() -> str:
    return _noise(
        lambda x: functional.uniform_dropout(x, 0.5), "Factors between 0.5 and 1.5, all alike"
    )


def _path_drop() -> str:
    inputs = torch.eye(3).expand(16, 3, 3).unbind(1)
    local = functional.path_drop(inputs, 0.5)
    column = functional.path_drop_column(3, 16, "global")
    whole = functional.path_drop(inputs, 0.5, column=column)
    panels = [("local", local), ("global", whole)]
    return _svg(panels, "Weights of the three inputs of a join, for 16 samples", 16)


def _shake_drop() -> str:
    x = torch.ones(16, 1, requires_grad=True)
    y = functional.shake_drop(x, 0.5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    panels = [
        ("forward", y.detach().expand(-1, 6)),
        ("backward", gradient.expand(-1, 6)),
    ]
    return _svg(panels, "The factors of 16 samples; about half of them are 1, red is below 0", 10)


def _cutout() -> str:
    return _svg(_samples(functional.cutout(torch.ones(6, 1, 16, 16), 8)[:, 0]), "Each its own hole")


def _dropout_and_batch_norm() -> str:
    mask = torch.nn.functional.dropout(torch.ones(16, 32), 0.5)
    panels = [("training", mask), ("evaluation", torch.ones(16, 32))]
    return _svg(panels, "Factors 0 and 2 in training, 1 in evaluation: another variance", 6)


# The rules over time of docs/schedules.md: one panel each.
RULES = (
    over_time.ramp(0.0, 0.4),
    over_time.cosine(0.4, 0.0),
    over_time.steps([(0.0, 0.4), (0.25, 0.1), (1.0, 0.0)]),
    over_time.steps([(0.0, 0.4), (0.25, 0.1), (1.0, 0.0)], joined=True),
    over_time.early(0.4, 0.5),
    over_time.late(0.4, 0.5),
    over_time.progressive(0.6, 100.0),
    over_time.curriculum(0.4, 10.0),
)


def rates_over_time() -> str:
    """Return an SVG with the rate of each rule over the progress of training."""
    width, height, gap = 150, 80, 40
    shapes = []
    for number, rule in enumerate(RULES):
        left, top = 30 + number % 4 * (width + gap), 20 + number // 4 * (height + gap)
        label = f"{rule.name}, joined" if dict(rule.arguments).get("joined") else rule.name
        points = [
            f"{left + width * t / 200:.1f},{top + height * (1 - rule(t / 200) / 0.5):.1f}"
            for t in range(201)
        ]
        shapes += [
            f'<text x="{left}" y="{top - 6}">{label}</text>',
            f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#888"/>',
            f'<text x="{left - 26}" y="{top + 20}">0.4</text>',
            f'<text x="{left - 14}" y="{top + height + 4}">0</text>',
            f'<text x="{left + width - 6}" y="{top + height + 14}">1</text>',
            f'<polyline points="{" ".join(points)}" fill="none" stroke="#0b62c4" '
            f'stroke-width="2"/>',
        ]
    right, bottom = 4 * (width + gap), 2 * (height + gap) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right}" height="{bottom}" '
        f'viewBox="0 0 {right} {bottom}" role="img" font-family="sans-serif" font-size="11">'
        f"<title>The rate of each rule over the progress of training</title>"
        f'<rect width="{right}" height="{bottom}" fill="#fff"/>{"".join(shapes)}</svg>\n'
    )


PICTURES: dict[str, Callable[[], str]] = {
    "drop-path": _drop_path,
    "stochastic-depth": _stochastic_depth,
    "drop-block": _drop_block,
    "spatial-dropout": _spatial_dropout,
    "gaussian-dropout": _gaussian_dropout,
    "uniform-dropout": _uniform_dropout,
    "path-drop": _path_drop,
    "shake-drop": _shake_drop,
    "cutout": _cutout,
    "dropout-and-batch-norm": _dropout_and_batch_norm,
}


PLOTS: dict[str, Callable[[], str]] = {"rates-over-time": rates_over_time}


def picture(name: str) -> str:
    """Return the SVG of a method, always the same, without changing the random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return PICTURES[name]()


def on_files(files: Any, config: Any) -> Any:
    """Add methods/NAME.svg for each picture, and the plots; mkdocs calls this before it builds."""
    from mkdocs.structure.files import File

    for name in PICTURES:
        files.append(File.generated(config, f"methods/{name}.svg", content=picture(name)))
    for name, plot in PLOTS.items():
        files.append(File.generated(config, f"{name}.svg", content=plot()))
    return files


# Tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _conditions(entry: dict[str, Any], load: Sequence[float]) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in entry["versions"].items() if v is not None)
    clock = "processor time" if entry["clock"] == "processor" else "wall time"
    threads = "one thread" if entry["threads"] == 1 else f"{entry['threads']} threads"
    return (
        f"{entry['machine']['processor']}, {threads}, {clock}, load {load[0]:.1f} when it began; "
        f"{versions}."
    )


def _steps(results: dict[str, Any]) -> str:
    rows, conditions = [], {}
    for entry in results["rows"].values():
        if not entry["complete"]:
            continue
        row, over = entry["row"], entry["time_over_dense"]
        what = f"{row['network']}, {row['batch']} x {row['size']}"
        what += ", channels last" if row["channels_last"] else ""
        kept, mib = entry["bytes_over_dense"], entry["process_mib"]
        reached = over["torchdrop"] <= entry["bar"]
        bound = f" ({entry['bytes_bar']:.2f})" if "bytes_bar" in entry else ""
        rows.append(
            [
                what,
                f"{row['mode']}, {row['p']:g} {row['schedule']}",
                str(entry["n"]),
                f"{over['masked']:.2f}",
                f"{over['subset']:.2f}",
                f"**{over['torchdrop']:.2f}**",
                f"{entry['flops_over_dense']['torchdrop']:.2f}",
                f"{entry['bar']:.2f} {'yes' if reached else 'no'}",
                f"{kept['subset']:.2f}",
                f"{kept['torchdrop']:.2f}{bound}",
                " / ".join(f"{mib[name]['peak']:.0f}" for name in ("dense", "subset", "torchdrop")),
            ]
        )
        load = entry["pieces"][0]["load before"]
        conditions[_conditions(entry["conditions"], load)] = None
    head = [
        *("network, batch", "mode, p", "n", "masked", "subset", "torchdrop", "F", "aim"),
        *("bytes, subset", "bytes (aim)", "MiB"),
    ]
    return _table(head, rows) + "\n\n" + "  \n".join(conditions)


def _accelerator(results: dict[str, Any]) -> str:
    rows, conditions = [], {}
    for entry in results["rows"]:
        config, by = entry["config"], entry["contestants"]
        skipping = by["skipping"]
        what = f"{config['model']}, {config['batch']} x {config['size']}"
        what += ", channels last" if config["channels_last"] else ""
        what += ", compiled" if config["compile"] else ""
        rows.append(
            [
                what,
                f"{config['mode']}, {config['p']:g} {config['schedule']}",
                f"{by['dense']['ms']['median']:.1f}",
                f"{by['masked']['time_over_dense']:.2f}",
                f"**{skipping['time_over_dense']:.2f}**",
                f"{skipping['flops_over_dense']:.2f}",
                f"{skipping['bytes_over_dense']:.2f}",
                " / ".join(f"{by[n]['peak_bytes'] / 2**20:.0f}" for n in ("dense", "skipping")),
            ]
        )
        versions = ", ".join(f"{name} {entry['versions'][name]}" for name in ("torch", "timm"))
        conditions[f"{entry['machine']['accelerator']}; {versions}."] = None
    head = ["network, batch", "mode, p", "dense, ms", "masked", "torchdrop", "F", "bytes", "MiB"]
    return _table(head, rows) + "\n\n" + "  \n".join(conditions)


def _overhead(results: dict[str, Any]) -> str:
    part = results["overhead"]
    modes = ("row", "row, chosen", "batch")
    rows = [
        [str(case["blocks"]), *(f"{case['microseconds'][mode]:.0f}" for mode in modes)]
        for case in part["cases"]
    ]
    about = _conditions(part["conditions"], part["conditions"]["load before"])
    head = ["blocks", "row, µs", "row, as chosen, µs", "batch, µs"]
    return _table(head, rows) + f"\n\n{about}"


def _choice(results: dict[str, Any]) -> str:
    part = results["choice"]
    rows = [
        [
            f"{case['kind']}, {' x '.join(map(str, case['shape']))}",
            f"{case['p']:g}",
            f"{case['elements left out']:.0f}",
            f"{case['multiply-adds left out']:.1e}" if case["multiply-adds left out"] else "0",
            *(f"{1e3 * case['ms'][name] / 6:.0f}" for name in ("dense", "skip", "mask")),
            f"{case['skip over mask']:.2f}",
        ]
        for case in part["cases"]
    ]
    about = _conditions(part["conditions"], part["conditions"]["load before"])
    head = ["branch", "p", "elements left out", "multiply-adds left out"]
    head += ["dense, µs a block", "skip", "mask", "skip / mask"]
    return _table(head, rows) + f"\n\n{about}"


def _compiled(results: dict[str, Any]) -> str:
    rows, conditions = [], {}
    for name, entry in results["rows"].items():
        what = f"{name}, {entry['row']['batch']} x {entry['row']['size']}"
        if "failed" in entry:
            rows.append([what, f"failed: {entry['failed'][0]}", *[""] * 5])
            continue
        training = entry["training"]
        times = [
            f"{entry[key]:.2f}" for key in ("time_over_dense", "flops_over_dense") if key in entry
        ]
        rows.append(
            [
                what,
                str(sum(training)),
                str(sum(training[10:])),
                str(entry["evaluation"]),
                f"{entry['off by']:.1e}",
                f"{entry['seconds of training']:.0f}",
                " / ".join(times) or "-",
            ]
        )
        conditions[_conditions(entry["conditions"], entry["load before"])] = None
    head = ["network, batch", "compilations in 30 steps", "after step 10", "in evaluation"]
    head += ["eager and compiled differ by", "seconds of the 30 steps", "T / F"]
    return _table(head, rows) + "\n\n" + "  \n".join(conditions)


def _growth(results: dict[str, Any], part: str, first: str) -> str:
    rows = []
    for case in results[part]["cases"]:
        cells = [
            f"{case['time_over_dense'][mode]:.2f} ({case['flops_over_dense'][mode]:.2f})"
            for mode in ("row", "batch")
        ]
        rows.append([str(case[first]), f"{case['ms']['dense']:.1f}", *cells])
    about = _conditions(results[part]["conditions"], results[part]["conditions"]["load before"])
    head = [first, "dense, ms", "row, .5 uniform", "batch, .5 linear"]
    return _table(head, rows) + f"\n\n{about}"


_ENDS = {
    "skipped": "every branch skipped",
    "masked": "some masked",
    "whole": "dropped as a whole",
    "left out": "some not taken",
    "refused": "refused",
    "refused in a call": "refused in a call",
    "wrong": "wrong",
    "raw error": "error of PyTorch",
    "died": "process died",
}


def _composed(results: dict[str, Any]) -> str:
    rows = []
    for name, end in _ENDS.items():
        counts = [totals.get(name, 0) for totals in results["totals"].values()]
        rows.append([end, *(f"{n} ({n / results['models']:.1%})" for n in counts)])
    for label, part in (
        ("branches skipped", "branches"),
        ("the same, in models that mix no rows", "branches of models that mix no rows"),
    ):
        counts = list(results[part].values())
        rows.append(
            [label, *(f"{c.get('skip', 0)} of {sum(c.values())}" for c in counts)],
        )
    head = [f"{results['models']} models", *results["totals"]]
    about = results["about"]
    versions = ", ".join(f"{n} {about[n]}" for n in ("torchdrop", "torch", "hypothesis", "python"))
    return f"{_table(head, rows)}\n\n`{about['command']}`; {about['processor']}; {versions}."


def _constructs(results: dict[str, Any]) -> str:
    rows = []
    for name, counts in results["constructs"].items():
        broken = sum(counts.get(end, 0) for end in ("wrong", "raw error", "died"))
        refused = counts.get("refused", 0) + counts.get("refused in a call", 0)
        ends = (counts.get("skipped", 0), counts.get("masked", 0), refused, broken)
        rows.append([name, str(counts["models"]), *map(str, ends)])
    return _table(["construct", "models", "all skipped", "some masked", "refused", "wrong"], rows)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "steps": ("steps.json", _steps),
    "accelerator": ("accelerator.json", _accelerator),
    "overhead": ("scale.json", _overhead),
    "choice": ("scale.json", _choice),
    "compiled": ("compiled.json", _compiled),
    "depth": ("scale.json", lambda results: _growth(results, "depth", "depth")),
    "batch": ("scale.json", lambda results: _growth(results, "batch", "batch")),
    "composed": ("reliability.json", _composed),
    "constructs": ("reliability.json", _constructs),
}


def with_tables(markdown: str, results: Path = RESULTS) -> str:
    """Return the page with a table for each of its ``<!-- table: NAME -->``."""

    def made(match: re.Match[str]) -> str:
        file, make = TABLES[match[1]]
        try:
            found = json.loads((results / file).read_text(encoding="utf-8"))
            return make(found)
        except (FileNotFoundError, KeyError):  # no file, or a file without this part
            return f"Not measured yet: there are no such figures in benchmarks/results/{file}."

    return re.sub(r"<!-- table: (\w+) -->", made, markdown)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Insert the tables into a page; mkdocs calls this with each page."""
    return with_tables(markdown)
