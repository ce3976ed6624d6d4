"""report.html: a self-contained page with the table, the curves and the configuration."""

from __future__ import annotations

import io
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from .results import write_whole
from .table import COLUMNS, cells

__all__ = ["write_report"]

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>torchdrop compare: {{ config.model }} on {{ config.data }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ccc }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto }
pre { overflow-x: auto; background: #f4f4f4; padding: 1rem }
</style>
<h1>{{ config.model }} on {{ config.data }}</h1>
<p>{% if config.seeds > 1 %}Mean ± standard deviation over {{ config.seeds }} seeds.
{%- else %}One seed, so that there is no standard deviation.{% endif %}
{% if status != "complete" %}<strong>Not complete: runs are missing.</strong>{% endif %}</p>
<table>
<tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<dl>
{% for name, method in methods.items() %}<dt><code>{{ name }}</code>
{%- if method.p is not none %}, p = {{ "%.4g"|format(method.p) }}{% endif %}</dt>
<dd>{{ method.summary }}</dd>
{% endfor %}</dl>
{% for title, figure in figures %}<h2>{{ title }}</h2>
{{ figure|safe }}
{% endfor %}
<h2>Configuration, versions and machine</h2>
<pre>{{ made }}</pre>
</html>
"""


def write_report(content: dict[str, Any], path: Path) -> None:
    """Write the report, from the content of results.json.

    Raises:
        UserError: The file cannot be written.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(_PAGE).render(
        config=content["config"],
        status=content["status"],
        columns=COLUMNS,
        rows=cells(content),
        methods=content["methods"],
        figures=[
            ("Test error during training", _curves(content, "test_error", "test error %", 100.0)),
            ("Training loss", _curves(content, "train_loss", "training loss", 1.0)),
        ],
        made=json.dumps({key: content[key] for key in ("config", "versions", "machine")}, indent=1),
    )
    write_whole(path, page)


def _curves(content: dict[str, Any], key: str, label: str, factor: float) -> str:
    """Return a figure as SVG: for each method the mean over seeds, and the range of the seeds."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, method in content["methods"].items():
        curves = [seed["curves"] for seed in method["seeds"]]
        if not curves:
            continue
        series = [curve[key] for curve in curves]
        epochs = curves[0]["test_epoch"] if key == "test_error" else range(1, len(series[0]) + 1)
        at_epoch = [
            [factor * value for value in values if value is not None]
            for values in zip(*series, strict=True)
        ]
        drawn = [(epoch, values) for epoch, values in zip(epochs, at_epoch, strict=False) if values]
        x = [epoch for epoch, _ in drawn]
        shown = name.replace("$", r"\$")  # matplotlib reads $...$ as a formula
        (line,) = axes.plot(x, [fmean(values) for _, values in drawn], label=shown)
        low, high = [min(values) for _, values in drawn], [max(values) for _, values in drawn]
        axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    buffer = io.StringIO()
    # Without a date and with fixed ids of elements, the same results give the same page.
    with matplotlib.rc_context({"svg.hashsalt": "torchdrop", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
