"""Time training steps in turn in one process: dense, masked, a subset of rows, torchdrop.

    python benchmarks/steps.py                        # all rows: about 40 minutes on two cores
    python benchmarks/steps.py --list
    python benchmarks/steps.py --only resnet50-batch --budget 300 --out runs/steps.json

A step is forward, cross entropy and backward. In each round all four run one step, each time in
another order. The script reports medians over dense (in batch mode means, since the work that is
left out varies from step to step); F, the FLOPs of the same steps of torchdrop over dense; the
bytes kept for backward; and the peak memory of a process that only runs steps of one of them.

The file is written after every part of a row, and when the --budget of seconds is spent (after
the current part; counting the FLOPs of batch mode takes some minutes). Run again, the script
continues where it ended. A row that was started with another state of the code, other versions or
other options is measured again from its first step. Times measured on a busy machine mean little,
and the load is recorded; there, --threads 1 --clock processor gives ratios of processor time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch
from machine import processor, version
from peers import NETWORKS, add_masks, add_subsets, blocks_of
from torch import Tensor, nn

import torchdrop
from torchdrop.app.results import write_whole
from torchdrop.app.timing import in_turn
from torchdrop.cost import flops, saved_bytes
from torchdrop.schedules import over_depth

WARM_UP = 2
CPU = torch.device("cpu")
CONTESTANTS = ("dense", "masked", "subset", "torchdrop")


@dataclass(frozen=True)
class Row:
    """A row of the table, and its aim for torchdrop over dense: F + slack, or slack alone."""

    name: str
    network: str
    batch: int
    size: int
    mode: str
    p: float
    schedule: str
    slack: float
    above_flops: bool = True
    channels_last: bool = False

    @property
    def rates(self) -> list[float]:
        with torch.device("meta"):
            return over_depth(self.p, len(blocks_of(NETWORKS[self.network]())), self.schedule)

    def batch_of(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        if self.network.startswith("encoder"):
            x = torch.randint(1000, (self.batch, self.size))
        else:
            x = torch.randn(self.batch, 3, self.size, self.size)
            if self.channels_last:
                x = x.to(memory_format=torch.channels_last)
        return x.to(device), torch.randint(10, (self.batch,)).to(device)

    def model(self, contestant: str) -> nn.Module:
        torch.manual_seed(0)
        model = NETWORKS[self.network]().train()
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if contestant == "masked":
            add_masks(model, self.rates, self.mode)
        elif contestant == "subset":
            add_subsets(model, self.rates, self.mode)
        elif contestant == "torchdrop":
            torchdrop.add_stochastic_depth(
                model,
                self.p,
                schedule=self.schedule,
                mode=self.mode,
                example_inputs=self.batch_of()[0][:2],
            )
        return model


VIT, CONVNEXT = "timm vit_tiny_patch16_224", "timm convnext_atto"
RESNET, CIFAR, ENCODER = "torchvision resnet50", "CIFAR resnet-110", "encoder, 24 layers"

ROWS = [
    Row("vit-.5", VIT, 32, 224, "row", 0.5, "uniform", 0.04),
    Row("vit-.2", VIT, 32, 224, "row", 0.2, "linear", 0.04),
    Row("resnet50-.5", RESNET, 16, 128, "row", 0.5, "uniform", 0.10),
    Row("resnet50-.5-last", RESNET, 16, 128, "row", 0.5, "uniform", 0.10, channels_last=True),
    Row("resnet50-.2", RESNET, 16, 128, "row", 0.2, "linear", 1.0, above_flops=False),
    Row("resnet50-batch", RESNET, 16, 128, "batch", 0.5, "linear", 0.05),
    Row("convnext-.3-last", CONVNEXT, 32, 224, "row", 0.3, "uniform", 0.08, channels_last=True),
    Row("resnet110-batch", CIFAR, 128, 32, "batch", 0.5, "linear", 0.05),
    Row("encoder-.4", ENCODER, 64, 128, "row", 0.4, "uniform", 0.05),
]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def steps_of(model: nn.Module, x: Tensor, y: Tensor, begin: int = 0) -> Callable[[], None]:
    """Return a function that runs a training step, seeded with the number of the step."""
    numbers = count(begin)

    def step() -> None:
        torch.manual_seed(next(numbers))
        model.zero_grad(set_to_none=True)
        loss_of(model, x, y).backward()

    return step


def count_flops(row: Row, steps: int) -> dict[str, float]:
    """Return the FLOPs over dense of steps 0 to ``steps`` - 1, those that are timed.

    In row mode the number of rows hardly varies, so that four steps are enough. In batch mode every
    step is counted, on the meta device, which computes nothing.
    """
    device = "meta" if row.mode == "batch" else "cpu"
    x, y = row.batch_of(device)
    counted = steps if row.mode == "batch" else 4
    dense = flops(steps_of(row.model("dense").to(device), x, y))
    found = {}
    for name in ("subset", "torchdrop"):
        step = steps_of(row.model(name).to(device), x, y)
        found[name] = fmean(flops(step) for _ in range(counted)) / dense
    return found


def count_bytes(row: Row, steps: int) -> dict[str, float]:
    """Return the bytes kept for backward over dense, also with every branch dropped."""
    x, y = row.batch_of()
    counted = min(steps, 20) if row.mode == "batch" else 4
    found = {}
    for name in CONTESTANTS:
        model = row.model(name)
        torch.manual_seed(0)
        times = 1 if name == "dense" else counted
        found[name] = fmean(saved_bytes(loss_of, model, x, y) for _ in range(times))
    torchdrop.get_plan(model).set_p([1.0] * len(blocks_of(model)))
    found["every branch dropped"] = saved_bytes(loss_of, model, x, y)
    return {name: value / found["dense"] for name, value in found.items()}


def high_water() -> float:
    """Return the peak memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the memory of the parent at the fork
        (kib,) = [s.split()[1] for s in status.read_text().splitlines() if s.startswith("VmHWM")]
        return int(kib) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def peak_memory(row: Row, contestant: str) -> dict[str, float]:
    """Return MiB of this process: before its first step, and the peak of three steps."""
    x, y = row.batch_of()
    step = steps_of(row.model(contestant), x, y)
    before = high_water()
    for _ in range(3):
        step()
    return {"before": before, "peak": high_water()}


def measure_memory(row: Row, threads: int) -> dict[str, dict[str, float]]:
    """Return :func:`peak_memory` of each contestant, in a process of its own."""
    found = {}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, "--threads", str(threads), "--peak", row.name, name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(output)
    return found


def digest() -> str:
    """Return a digest of the measured code: all packages except ``app``, and peers.py."""
    found = hashlib.blake2b(digest_size=8)
    package = Path(torchdrop.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] != "app":
            found.update(path.read_bytes())
    found.update(Path(__file__).with_name("peers.py").read_bytes())
    return found.hexdigest()


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """Return the versions, machine and options that a figure depends on."""
    names = ("torchdrop", "torch", "torchvision", "timm")
    return {
        "versions": {"python": platform.python_version(), **{n: version(n) for n in names}},
        "code": digest(),
        "machine": {"system": platform.platform(), "processor": processor()},
        "threads": options.threads,
        "clock": options.clock,
        "dtype": "float32",
    }


def summary(row: Row, entry: dict[str, Any]) -> None:
    """Update the ratios of a row from its times."""
    over = fmean if row.mode == "batch" else median
    dense = over(entry["ms"]["dense"])
    entry["n"] = len(entry["ms"]["dense"])
    entry["time_over_dense"] = {name: over(ms) / dense for name, ms in entry["ms"].items()}
    entry["spread"] = {}
    for name, ms in entry["ms"].items():
        if len(ms) > 1:
            low, middle, high = quantiles(ms, n=4)
            entry["spread"][name] = {"low": low, "median": middle, "high": high}
    counted = entry.get("flops_over_dense")
    if counted:
        entry["bar"] = row.slack + (counted["torchdrop"] if row.above_flops else 0.0)
    kept = entry.get("bytes_over_dense")
    if kept and row.schedule == "uniform":
        least = kept["every branch dropped"]
        entry["bytes_bar"] = least + (1 - row.p) * (1 - least) + 0.03


def run(
    row: Row,
    entry: dict[str, Any],
    steps: int,
    until: float,
    options: Any,
    save: Callable[[], None],
) -> bool:
    """Measure and save the missing parts of a row; return whether the row is complete."""
    clock = time.process_time if options.clock == "processor" else time.perf_counter
    ms = entry.setdefault("ms", {name: [] for name in CONTESTANTS})
    done = len(ms["dense"])
    if done < steps:
        x, y = row.batch_of()
        models = {name: row.model(name) for name in CONTESTANTS}
        for model in models.values():
            warm_up = steps_of(model, x, y, steps)
            for _ in range(WARM_UP):
                warm_up()
        runs = {name: steps_of(model, x, y, done) for name, model in models.items()}
        piece = {
            "command": " ".join(["python", *sys.argv]),
            "from": done,
            "load before": os.getloadavg(),
        }
        entry.setdefault("pieces", []).append(piece)
        for taken in islice(in_turn(runs, CPU, clock, done), steps - done):
            for name, value in taken.items():
                ms[name].append(round(value, 4))
            if time.monotonic() > until:
                break
        piece["load after"] = os.getloadavg()
        del models, runs
        save()
    if len(ms["dense"]) < steps or time.monotonic() > until:
        return False
    for name, measure in (
        ("flops_over_dense", lambda: count_flops(row, steps)),
        ("bytes_over_dense", lambda: count_bytes(row, steps)),
        ("process_mib", lambda: measure_memory(row, options.threads)),
    ):
        if name not in entry:
            if time.monotonic() > until:
                return False
            entry[name] = measure()
            save()
    return True


def line(row: Row, entry: dict[str, Any]) -> str:
    over = entry["time_over_dense"]
    cells = [f"{row.name:16} n={entry['n']:<4}"]
    cells += [f"{name} {over[name]:.3f}" for name in CONTESTANTS[1:]]
    if "flops_over_dense" in entry:
        cells.append(f"F {entry['flops_over_dense']['torchdrop']:.3f} bar {entry['bar']:.3f}")
    if "bytes_over_dense" in entry:
        kept = entry["bytes_over_dense"]
        cells.append(f"bytes {kept['torchdrop']:.3f} subset {kept['subset']:.3f}")
        cells.append(f"bar {entry['bytes_bar']:.3f}" if "bytes_bar" in entry else "")
    if "process_mib" in entry:
        cells.append("MiB " + " ".join(f"{v['peak']:.0f}" for v in entry["process_mib"].values()))
    return "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--list", action="store_true", help="show their names")
    parser.add_argument("--steps", type=int, default=21, help="in row mode")
    parser.add_argument("--batch-steps", type=int, default=200, help="in batch mode")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--out", type=Path, default=Path("runs/steps.json"))
    parser.add_argument("--peak", nargs=2, metavar=("ROW", "CONTESTANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    by_name = {row.name: row for row in ROWS}
    unknown = [name for name in options.only if name not in by_name]
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}; see --list")
    if options.list:
        print("\n".join(by_name))
        return
    if options.peak:
        print(json.dumps(peak_memory(by_name[options.peak[0]], options.peak[1])))
        return
    until = time.monotonic() + options.budget
    content: dict[str, Any] = {"schema": 1, "rows": {}}
    if options.out.exists():
        content = json.loads(options.out.read_text())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = conditions(options)
    for row in ROWS:
        if options.only and row.name not in options.only:
            continue
        entry = content["rows"].get(row.name)
        fresh = {"row": asdict(row), "conditions": about}
        if entry is None or {key: entry[key] for key in fresh} != fresh:
            entry = content["rows"][row.name] = fresh
        content["rows"] = {n: content["rows"][n] for n in by_name if n in content["rows"]}
        entry["complete"] = False

        def save(row: Row = row, entry: dict[str, Any] = entry) -> None:
            summary(row, entry)
            write_whole(options.out, json.dumps(content) + "\n")

        steps = options.batch_steps if row.mode == "batch" else options.steps
        entry["complete"] = run(row, entry, steps, until, options, save)
        save()
        more = "" if entry["complete"] else "  (run again to go on)"
        print(line(row, entry) + more, flush=True)
        if time.monotonic() > until:
            break


if __name__ == "__main__":
    main()
