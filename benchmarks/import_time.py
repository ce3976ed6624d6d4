"""Measure what ``import torchdrop`` adds to ``import torch``, in fresh processes that alternate.

    python benchmarks/import_time.py --out benchmarks/results/import_time.json

Each process is timed from its start to its end, by the clock (wall) and by the processor time that
it used (cpu), which a busy machine hardly changes. The bytecode of all modules is written once
before, as an installation does, so that no figure contains the time of compiling sources.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from machine import processor, version

PROGRAMS = {"torch": "import torch", "torch and torchdrop": "import torch, torchdrop"}
CLOCKS = ("wall", "cpu")

# Modules that take long to import and that torchdrop imports only when they are needed.
HEAVY = ("torch._dynamo", "torch._inductor", "torch.utils.flop_counter", "triton", "sympy")


def run(code: str, environment: dict[str, str]) -> dict[str, float]:
    """Run ``code`` in a fresh process; return the seconds that it took by each clock."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu}


def measure(runs: int) -> dict[str, Any]:
    """Return the seconds of ``runs`` processes of each program, and what torchdrop adds."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for code in PROGRAMS.values():
            run(code, environment)
        for _ in range(runs):
            for name, code in PROGRAMS.items():
                taken[name].append(run(code, environment))
    return {clock: summary(taken, clock) for clock in CLOCKS}


def summary(taken: dict[str, list[dict[str, float]]], clock: str) -> dict[str, Any]:
    """Return median and least seconds of each program, and what torchdrop adds, as a share."""
    seconds = {name: [times[clock] for times in runs] for name, runs in taken.items()}
    found: dict[str, Any] = {
        name: {"median": median(times), "least": min(times), "all": times}
        for name, times in seconds.items()
    }
    first, both = found.values()
    found["added"] = {key: both[key] / first[key] - 1.0 for key in ("median", "least")}
    return found


def heavy_modules() -> list[str]:
    """Return which of the heavy modules ``import torchdrop`` imports and ``import torch`` not."""
    code = (
        f"import sys, torch; before = set(sys.modules); import torchdrop; "
        f"print(*(name for name in {HEAVY} if name in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load = [os.getloadavg()[0]]
    times = measure(options.runs)
    load.append(os.getloadavg()[0])
    about = {
        "command": f"python benchmarks/import_time.py --runs {options.runs}",
        "torch": version("torch"),
        "python": platform.python_version(),
        "processor": processor(),
        "platform": platform.platform(),
        "load": load,
        "heavy modules that torchdrop imports": heavy_modules(),
    }
    for clock, found in times.items():
        for name in PROGRAMS:
            taken = found[name]
            middle, least = (f"{key} {taken[key]:.3f} s" for key in ("median", "least"))
            print(f"{clock:5}{name:22}{middle}  {least}")
        middle, least = (f"{key} {found['added'][key]:.1%}" for key in ("median", "least"))
        print(f"{clock:5}{'torchdrop adds':22}{middle}  {least}")
    print(f"load {load[0]:.1f} to {load[1]:.1f}, torch {about['torch']}, {about['processor']}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"about": about, "seconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
