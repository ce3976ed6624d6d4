"""Time training steps on an accelerator, where moving memory takes most of the time.

    python benchmarks/accelerator.py --out runs/accelerator.json      # five minutes on one H100

Each row is a run of ``torchdrop bench``: dense, masked and skipping steps in turn. The results are
written to one file after each row; for a row that fails, the file holds the error.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from torchdrop.app.bench import Settings, bench
from torchdrop.app.errors import UserError
from torchdrop.app.results import write_whole

HALF: dict[str, Any] = {"p": 0.5, "schedule": "uniform"}
ROWS: list[dict[str, Any]] = [
    {"model": "resnet50", "batch": 128, **HALF},
    {"model": "resnet50", "batch": 128, "channels_last": True, **HALF},
    {"model": "resnet50", "batch": 128, "p": 0.2},
    {"model": "resnet50", "batch": 128, "p": 0.5, "mode": "batch"},
    {"model": "vit_base_patch16_224", "batch": 64, **HALF},
    {"model": "vit_tiny_patch16_224", "batch": 256, **HALF},
    {"model": "convnext_tiny", "batch": 64, "channels_last": True, **HALF, "p": 0.3},
    {"model": "resnet-110", "batch": 128, "p": 0.5, "mode": "batch"},
    {"model": "vit_base_patch16_224", "batch": 64, "compile": True, **HALF},
]


def measure(row: dict[str, Any], device: str | None) -> dict[str, Any]:
    """Return the results of ``torchdrop bench``, without the path of its file."""
    with tempfile.TemporaryDirectory() as folder:
        found = bench(Settings(out=Path(folder), device=device, **row))
    del found["path"], found["config"]["out"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", help="cuda, mps or cpu; the fastest there is if not given")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for row in ROWS:
        try:
            results.append(measure(row, options.device))
        except UserError as error:
            print(f"{row['model']}: {error}", flush=True)
            continue
        print(f"{row['model']}: {results[-1]['finding']}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out, json.dumps({"rows": results}, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
