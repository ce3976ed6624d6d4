"""Measure how the cost of torchdrop grows: with depth, with the batch, and for tiny blocks.

    python benchmarks/scale.py --out runs/scale.json
    python benchmarks/scale.py --only overhead --threads 1 --clock processor

overhead   Microseconds for each block and step, on stacks of 9 to 600 blocks that cost next to
           nothing (``x + w * x`` with one parameter): the time of Python, the draws, the rows and
           their backward. A round is one step of the dense stack, of an empty stack, and of
           torchdrop on the stack; in row mode with compute="skip", and with compute="auto", which
           masks these blocks. The overhead is the time of torchdrop minus that of the empty stack
           minus the kept share of the dense blocks' time.
choice     Where a mask takes less time than skipping: steps of stacks of 6 blocks in row mode, with
           compute="skip" over compute="mask", and how much work is left out in a branch.
depth      Steps of CIFAR ResNet-20, -56, -110, -302 and -1202 over dense, and their FLOPs.
batch      Steps of CIFAR ResNet-20 over dense, on batches of 1 to 512.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from steps import CPU, WARM_UP, conditions, steps_of
from torch import Tensor, nn

import torchdrop
from torchdrop.app.models import CifarResNet
from torchdrop.app.results import write_whole
from torchdrop.app.timing import in_turn
from torchdrop.cost import flops

BLOCKS = (9, 27, 54, 150, 600)
DEPTHS = (20, 56, 110, 302, 1202)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MODES: dict[str, dict[str, Any]] = {
    "row": {"mode": "row", "p": 0.5, "schedule": "uniform", "compute": "skip"},
    "batch": {"mode": "batch", "p": 0.5, "schedule": "linear"},
}
CHOSEN = {**MODES["row"], "compute": "auto"}
# Rows, tokens and width of the input of a stack.
SIZES = {
    "elementwise": [
        (32, 1, 8),
        (32, 1, 64),
        (64, 4, 64),
        (32, 16, 64),
        (32, 16, 128),
        (64, 16, 256),
    ],
    "mlp": [
        (16, 1, 16),
        (64, 1, 16),
        (32, 1, 64),
        (128, 1, 64),
        (64, 1, 128),
        (64, 1, 256),
        (32, 16, 64),
    ],
}


class Scale(nn.Module):
    """A branch that costs next to nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).relu()


class Nothing(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.branch = Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def stack(blocks: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), *(Nothing() for _ in range(blocks)), nn.Linear(8, 10))


def timed(runs: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, float]:
    """Return milliseconds of alternating steps after a warm-up: median, in batch mode mean."""
    clock = time.process_time if options.clock == "processor" else time.perf_counter
    taken = list(islice(in_turn(runs, CPU, clock), options.steps + WARM_UP))[WARM_UP:]
    found = {}
    for name in runs:
        over = fmean if name == "batch" else median
        found[name] = over(one[name] for one in taken)
    return found


def overhead(options: argparse.Namespace) -> list[dict[str, Any]]:
    x, y = torch.randn(32, 8), torch.randint(10, (32,))
    found = []
    for blocks in BLOCKS:
        runs = {"dense": steps_of(stack(blocks), x, y), "empty": steps_of(stack(0), x, y)}
        kept = {}
        for mode, rates in {**MODES, "row, chosen": CHOSEN}.items():
            model = stack(blocks).train()
            plan = torchdrop.add_stochastic_depth(model, **rates)
            runs[mode] = steps_of(model, x, y)
            # In row mode every branch runs on fewer rows, which takes no less time in such blocks.
            p = fmean(branch.p for block in plan.blocks for branch in block.branches)
            kept[mode] = 1.0 - p if mode == "batch" else 1.0
        ms = timed(runs, options)
        per_block = {
            mode: 1e3 * (ms[mode] - ms["empty"] - share * (ms["dense"] - ms["empty"])) / blocks
            for mode, share in kept.items()
        }
        found.append({"blocks": blocks, "ms": ms, "microseconds": per_block})
        cells = "  ".join(f"{mode} {value:7.1f} us" for mode, value in per_block.items())
        print(f"overhead  {blocks:5} blocks  {cells}", flush=True)
    return found


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shrink(nn.functional.gelu(self.grow(self.norm(x))))


def choice(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for kind, sizes in SIZES.items():
        for rows, tokens, width in sizes:
            for p in (0.1, 0.5):
                x, y = torch.randn(rows, tokens, width), torch.randint(10, (rows,))
                runs = {}
                for compute in ("dense", "skip", "mask"):
                    blocks = [Mlp(width) if kind == "mlp" else Nothing(width) for _ in range(6)]
                    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(tokens * width, 10))
                    if compute != "dense":
                        torchdrop.add_stochastic_depth(
                            model, p, schedule="uniform", compute=compute
                        )
                    runs[compute] = steps_of(model, x, y)
                ms = timed(runs, options)
                weights = 8 * width**2 if kind == "mlp" else 0
                entry = {
                    "kind": kind,
                    "p": p,
                    "shape": [rows, tokens, width],
                    "elements left out": p * x.numel(),
                    "multiply-adds left out": p * rows * tokens * weights,
                    "ms": ms,
                    "skip over mask": ms["skip"] / ms["mask"],
                }
                found.append(entry)
                print(
                    f"choice    {kind:11} {p} of {rows} x {tokens} x {width}: left out "
                    f"{entry['elements left out']:.0f} elements, "
                    f"{entry['multiply-adds left out']:.0f} multiply-adds; "
                    f"skip over mask {entry['skip over mask']:.2f}",
                    flush=True,
                )
    return found


def over_dense(depth: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time steps of a CIFAR ResNet (32 x 32) over dense, and count the FLOPs of these steps."""
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    runs, share = {}, {}
    for mode, rates in {"dense": None, **MODES}.items():
        models = []
        for device in ("cpu", "meta"):  # meta: counts FLOPs without computing
            model = CifarResNet(depth).train()
            if rates is not None:
                torchdrop.add_stochastic_depth(model, **rates)
            models.append(model.to(device))
        runs[mode] = steps_of(models[0], x, y)
        step = steps_of(models[1], x.to("meta"), y.to("meta"), WARM_UP)
        share[mode] = fmean(flops(step) for _ in range(options.steps if mode == "batch" else 2))
    ms = timed(runs, options)
    # Means, since the work that batch mode leaves out varies from step to step.
    return {
        "depth": depth,
        "batch": batch,
        "ms": ms,
        "time_over_dense": {mode: ms[mode] / ms["dense"] for mode in MODES},
        "flops_over_dense": {mode: share[mode] / share["dense"] for mode in MODES},
    }


def grow(name: str, cases: list[tuple[int, int]], options: argparse.Namespace) -> list[Any]:
    found = []
    for case in cases:
        entry = over_dense(*case, options)
        found.append(entry)
        cells = "  ".join(
            f"{mode} {entry['time_over_dense'][mode]:.3f} (F {entry['flops_over_dense'][mode]:.3f})"
            for mode in MODES
        )
        print(f"{name:9} resnet-{case[0]:<5} batch {case[1]:<4} {cells}", flush=True)
    return found


PARTS: dict[str, Callable[[argparse.Namespace], list[Any]]] = {
    "overhead": overhead,
    "choice": choice,
    "depth": lambda options: grow("depth", [(depth, 16) for depth in DEPTHS], options),
    "batch": lambda options: grow("batch", [(20, batch) for batch in BATCHES], options),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--out", type=Path, default=Path("runs/scale.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    content: dict[str, Any] = {"schema": 1}
    if options.out.exists():
        content = json.loads(options.out.read_text())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        about = {
            "command": " ".join(["python", *sys.argv]),
            **conditions(options),
            "steps": options.steps,
            "load before": os.getloadavg(),
        }
        found = PARTS[name](options)
        about["load after"] = os.getloadavg()
        content[name] = {"conditions": about, "cases": found}
        write_whole(options.out, json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
