"""What an attached block costs beside its branch: microseconds a block and step, against depth.

Stacks of blocks that compute next to nothing, ``x + a * x`` on a small tensor, dense and with
stochastic depth, step by step in turns, in processor time of one thread. The difference is
divided by the number of blocks.

    python benchmarks/overhead.py --out overhead.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchdrop

DEPTHS = (9, 27, 54, 150, 600)  # the blocks of the CIFAR ResNet-20, 56, 110, 302 and 1202


class Scaled(nn.Module):
    """The cheapest module with a parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((width,), 0.001))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a * x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = Scaled(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def step_time(model: nn.Module, x: Tensor) -> float:
    start = time.process_time()
    model(x).sum().backward()
    return time.process_time() - start


def overhead(depth: int, mode: str, p: float, batch: int, width: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    dense = nn.Sequential(*(Block(width) for _ in range(depth)))
    attached = copy.deepcopy(dense)
    torchdrop.add_stochastic_depth(attached, p, schedule="uniform", mode=mode)
    x = torch.randn(batch, width)
    times: dict[str, list[float]] = {"dense": [], "attached": []}
    for i in range(steps + 2):
        for name, model in (("dense", dense), ("attached", attached)):
            taken = step_time(model, x)
            if i >= 2:  # two rounds of warm-up
                times[name].append(taken)
    # a step of batch mode leaves out a number of blocks that varies: its mean counts
    average = statistics.mean if mode == "batch" else statistics.median
    ms = {name: 1e3 * average(values) for name, values in times.items()}
    return {
        "blocks": depth,
        "mode": mode,
        "p": p,
        "batch": batch,
        "width": width,
        "steps": steps,
        "ms": ms,
        "us_a_block": 1e3 * (ms["attached"] - ms["dense"]) / depth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--p", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--depths", type=int, nargs="*", default=DEPTHS)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__, "torchdrop": torchdrop.__version__},
        "machine": {"processor": platform.machine(), "threads": 1},
        "cases": [],
    }
    print(f"{'blocks':>6} {'mode':6} {'us a block':>10}")
    for mode in ("row", "batch"):
        for depth in options.depths:
            case = overhead(depth, mode, options.p, options.batch, options.width, options.steps)
            results["cases"].append(case)
            print(f"{depth:6} {mode:6} {case['us_a_block']:10.1f}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
