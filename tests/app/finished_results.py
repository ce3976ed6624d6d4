"""The content of results.json of a finished comparison, and its table as text."""

from __future__ import annotations

import io

from rich.console import Console

from torchdrop.app.methods import METHODS
from torchdrop.app.results import FIGURES, Results


def finished_content(folder):
    """Two seeds of every method, with made-up figures."""
    results = Results(folder, {"model": "resnet-<20>", "data": "digits", "seeds": 2, "methods": {}})
    for name, method in METHODS.items():
        results.begin(name, p=0.5, asked_p=0.2778, summary=method.summary, variance_shift=12.345)
        for seed in range(2):
            curves = {
                "train_loss": [2.0, 1.0, None, 0.3],
                "test_epoch": [2, 4],
                "test_error": [0.5, 0.25 + 0.1 * seed],
            }
            figures = {**dict.fromkeys(FIGURES, 0.1234), "test_error": 0.1 + 0.2 * seed}
            results.add(name, seed, **figures, epoch=4, seconds=1.0, curves=curves)
    results.begin("none")["seeds"][0]["observed_p"] = None
    results.save(complete=True)
    return results.content


def as_text(table, width):
    """A table as it is printed where there is no terminal."""
    out = io.StringIO()
    Console(width=width, file=out).print(table)
    return out.getvalue()
