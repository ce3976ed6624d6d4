"""Count compilations under torch.compile with inductor while the rate changes in every step.

    python benchmarks/compiled.py --out runs/compiled.json        # about an hour on two cores
    python benchmarks/compiled.py --only vit_b_16 --times 15

Each network runs in a process of its own with ``torch.compile(model, fullgraph=True)``, which
raises an error at a graph break. ``plan.set_p`` sets another rate in each of 30 training steps. It
counts the compilations of each step, then those of evaluation, and measures how far the outputs of
evaluation are from eager. With --times, it times steps of the compiled network at p=.5 uniform in
turn with steps of the same network compiled without torchdrop, and reports their FLOPs over dense
(F), too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from steps import CPU, WARM_UP, conditions, steps_of
from timm import create_model
from torch import nn
from torch._dynamo.utils import counters
from torchvision.models import get_model

import torchdrop
from torchdrop.app.results import write_whole
from torchdrop.app.timing import in_turn
from torchdrop.cost import flops

BACKEND = "inductor"
STEPS = 30
SETTLED = 10  # the step after which nothing may be compiled


@dataclass(frozen=True)
class Row:
    """A network and the size of its batch."""

    source: str
    name: str
    batch: int
    size: int

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        make = create_model if self.source == "timm" else get_model
        model = make(self.name, num_classes=10)
        for parameter in model.parameters():  # with a head of zeros all outputs are equal
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model


ROWS = [
    Row("torchvision", "resnet18", 8, 64),
    Row("torchvision", "resnet50", 8, 64),
    Row("torchvision", "convnext_tiny", 8, 64),
    Row("torchvision", "swin_t", 8, 64),
    Row("torchvision", "vit_b_16", 8, 224),
    Row("timm", "resnet18.a1_in1k", 8, 64),
    Row("timm", "resnet50.a1_in1k", 8, 64),
    Row("timm", "convnext_tiny.fb_in1k", 8, 64),
    Row("timm", "swin_tiny_patch4_window7_224", 4, 224),
    Row("timm", "vit_base_patch16_224", 4, 224),
    Row("timm", "vit_tiny_patch16_224", 32, 224),
]


def in_graph(model: nn.Module) -> Callable[..., Any]:
    """Return ``model`` compiled, so that a graph break raises an error."""
    return torch.compile(model, fullgraph=True, backend=BACKEND)


def compilations() -> int:
    """Return the number of graphs that this process has compiled."""
    return int(counters["stats"]["unique_graphs"])


def growth(step: Callable[[], object]) -> int:
    """Return the number of graphs that ``step`` compiles."""
    before = compilations()
    step()
    return compilations() - before


def rate(step: int) -> float:
    """Return the rate of a training step: a different one in each."""
    return 0.05 + 0.5 * step / STEPS


def measure(row: Row, times: int) -> dict[str, Any]:
    """Train and evaluate one network, and time it if the options say so."""
    x, y = torch.randn(row.batch, 3, row.size, row.size), torch.randint(10, (row.batch,))
    model = row.model().train()
    plan = torchdrop.add_stochastic_depth(model, rate(0), example_inputs=x[:2])
    step = steps_of(in_graph(model), x, y)
    found: dict[str, Any] = {"training": []}
    begin = time.monotonic()
    for number in range(STEPS):
        plan.set_p(rate(number))
        found["training"].append(growth(step))
    found["seconds of training"] = round(time.monotonic() - begin, 1)
    rates = plan.observed()
    found["dropped"] = {"asked": rate((STEPS - 1) / 2), "delivered": fmean(rates.values())}

    model.eval()
    graph = in_graph(model)
    outputs = []
    with torch.no_grad():
        found["evaluation"] = growth(lambda: outputs.append(graph(x)))
        expected = model(x)
    found["off by"] = float((outputs[0] - expected).abs().max() / expected.abs().max())
    if times:
        model.train()
        plan.set_p([0.5] * len(plan.blocks))
        dense = row.model().train()
        eager = {"dense": steps_of(dense, x, y), "torchdrop": steps_of(model, x, y)}
        share = {name: fmean(flops(run) for _ in range(2)) for name, run in eager.items()}
        runs = {
            "dense": steps_of(in_graph(dense), x, y),
            "torchdrop": steps_of(in_graph(model), x, y),
            **{f"eager {name}": run for name, run in eager.items()},
        }
        taken = list(islice(in_turn(runs, CPU), times + WARM_UP))[WARM_UP:]
        ms = found["ms"] = {name: [one[name] for one in taken] for name in runs}
        found["flops_over_dense"] = share["torchdrop"] / share["dense"]
        found["time_over_dense"] = median(ms["torchdrop"]) / median(ms["dense"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NETWORK")
    parser.add_argument("--times", type=int, default=0, help="timed steps; 0: none are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1800, help="seconds a network may take")
    parser.add_argument("--out", type=Path, default=Path("runs/compiled.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.clock = "wall"
    by_name = {row.name: row for row in ROWS}
    unknown = [name for name in [*options.only, options.one] if name and name not in by_name]
    if unknown:
        parser.error(f"there is no network {unknown[0]!r}; there are {', '.join(by_name)}")
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(by_name[options.one], options.times)))
        return
    content: dict[str, Any] = {"schema": 1, "rows": {}}
    if options.out.exists():
        content = json.loads(options.out.read_text())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only or by_name:
        entry: dict[str, Any] = {"row": asdict(by_name[name]), "conditions": conditions(options)}
        entry["command"] = " ".join(["python", *sys.argv])
        entry["load before"] = os.getloadavg()
        command = [sys.executable, __file__, "--one", name, "--times", str(options.times)]
        command += ["--threads", str(options.threads)]
        try:
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=options.limit
            )
            entry |= json.loads(done.stdout.splitlines()[-1])
        except subprocess.CalledProcessError as error:
            entry["failed"] = error.stderr.splitlines()[-1:]
        except subprocess.TimeoutExpired:
            entry["failed"] = [f"took more than {options.limit:.0f} s"]
        content["rows"][name] = entry
        write_whole(options.out, json.dumps(content) + "\n")
        print(line(name, entry), flush=True)


def line(name: str, entry: dict[str, Any]) -> str:
    if "failed" in entry:
        return f"{name:30} failed: {entry['failed']}"
    training = entry["training"]
    cells = [
        f"{name:30} compilations {sum(training)}, after step {SETTLED} {sum(training[SETTLED:])}, "
        f"evaluation {entry['evaluation']}, off by {entry['off by']:.1e}",
        f"{entry['seconds of training']:.0f} s",
    ]
    if "time_over_dense" in entry:
        cells.append(
            f"T {entry['time_over_dense']:.3f} F {entry['flops_over_dense']:.3f}, "
            + ", ".join(f"{key} {median(ms):.0f} ms" for key, ms in entry["ms"].items())
        )
    return "  ".join(cells)


if __name__ == "__main__":
    main()
