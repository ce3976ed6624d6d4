"""Compare each gradient on several ranks with that of one process on the same rows.

``python benchmarks/soak/ranks.py --out runs/ranks.json`` takes about half an hour.
Runs 200 steps for each combination of 2 and 4 processes (gloo, CPU), DDP
(``find_unused_parameters=False``) and FSDP2 (one shard for each block and one at the root), mode,
local batch and rate. No rank may hang, lose a gradient, or end with different parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import torchdrop

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "laws"))
from ranks_worker import start

GROUPS = [
    (world, wrapper, mode)
    for world, wrapper in ((2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"))
    for mode in ("row", "batch")
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table: list[dict[str, Any]] = []
    began = time.time()
    for world, wrapper, mode in GROUPS:
        cases = {
            f"{batch} {p}": [
                "train",
                {"wrapper": wrapper, "mode": mode, "p": p, "batch": batch, "steps": options.steps},
            ]
            for batch in (1, 2, 3, 8)
            for p in (0.5, 0.9, 1.0)
        }
        with tempfile.TemporaryDirectory() as folder:
            reports = start(world, cases, Path(folder), timeout=3600)
        for name, (_, case) in cases.items():
            ranks = [report[name] for report in reports]
            decisions = [rank["decisions"] for rank in ranks]
            row = {
                "world": world,
                **case,
                "identical": all(rank["identical"] and rank["finite"] for rank in ranks),
                "missing": sum(rank["missing"] for rank in ranks),
                "gradient_error": max(rank["gradient_error"] for rank in ranks),
                "steps_alike": sum(
                    all(d[step] == decisions[0][step] for d in decisions)
                    for step in range(case["steps"])
                ),
                "dropped": sum(rank["dropped"] for rank in ranks) / world / case["batch"],
            }
            table.append(row)
            print(
                f"{world} {wrapper:4} {mode:5} batch {case['batch']} p {case['p']:.1f}  "
                f"identical {row['identical']}  missing {row['missing']}  "
                f"gradient {row['gradient_error']:.1e}  alike {row['steps_alike']}  "
                f"dropped {row['dropped']:.3f}",
                flush=True,
            )
        lost = [r for r in table if not r["identical"] or r["missing"]]
        lost += [r for r in table if r["gradient_error"] > 1e-12]
        lost += [r for r in table if r["mode"] == "batch" and r["steps_alike"] < r["steps"]]
        result = {
            "command": " ".join(["python", *sys.argv]),
            "versions": {"torch": torch.__version__, "torchdrop": torchdrop.__version__},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "seconds": time.time() - began,
            "groups": f"{len(table) // 12} of {len(GROUPS)}",
            "runs": len(table),
            "steps": sum(r["steps"] for r in table),
            "largest_gradient_error": max(r["gradient_error"] for r in table),
            "lost": lost,
            "table": table,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(table)} runs, {result['steps']} steps, {len(lost)} lost")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
