"""Training steps side by side in one process: dense, masked, and skipping what is dropped.

Alternates the three, step by step, and reports medians (means in batch mode, where the cost of a
step varies) over dense, with the FLOPs of the same steps and the bytes kept for backward.

    python benchmarks/steps.py --out steps.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import torchdrop
from torchdrop.cost import flops, saved_bytes

# name, batch, size, channels_last, mode, p, schedule
CASES: list[tuple[str, int, int, bool, str, float, str]] = [
    ("vit_b_16", 8, 224, False, "row", 0.5, "uniform"),
    ("resnet50", 16, 128, False, "row", 0.5, "uniform"),
    ("resnet50", 16, 128, True, "row", 0.5, "uniform"),
    ("resnet50", 16, 128, False, "row", 0.2, "linear"),
    ("resnet50", 16, 128, False, "batch", 0.5, "linear"),
    ("convnext_tiny", 8, 128, True, "row", 0.3, "uniform"),
]


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()

    return step


def run_case(case: tuple[str, int, int, bool, str, float, str], steps: int) -> dict[str, Any]:
    name, batch, size, channels_last, mode, p, schedule = case
    torch.manual_seed(0)
    dense = getattr(torchvision.models, name)(weights=None).train()
    x, y = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    if name.startswith("vit"):
        size = 224
    if channels_last:
        dense = dense.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    for module in dense.modules():  # masks of its own would be taken over in two of the three
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    masked, skipping = copy.deepcopy(dense), copy.deepcopy(dense)
    torchdrop.add_stochastic_depth(masked, p, mode=mode, schedule=schedule, compute="mask")
    plan = torchdrop.add_stochastic_depth(skipping, p, mode=mode, schedule=schedule)
    runs = {
        "dense": training_step(dense, x, y),
        "masked": training_step(masked, x, y),
        "torchdrop": training_step(skipping, x, y),
    }
    times: dict[str, list[float]] = {key: [] for key in runs}
    for i in range(steps + 2):
        for key, step in runs.items():
            start = time.perf_counter()
            step()
            if i >= 2:  # two rounds of warm-up
                times[key].append(time.perf_counter() - start)
    plan.observed()
    average = statistics.mean if mode == "batch" else statistics.median
    ms = {key: 1000 * average(values) for key, values in times.items()}
    counted = 20 if mode == "batch" else 6
    dense_flops = flops(runs["dense"])
    dense_bytes = saved_bytes(lambda: nn.functional.cross_entropy(dense(x), y))
    kept_bytes = [
        saved_bytes(lambda: nn.functional.cross_entropy(skipping(x), y)) for _ in range(counted)
    ]
    return {
        "model": name,
        "batch": batch,
        "size": size,
        "channels_last": channels_last,
        "mode": mode,
        "p": p,
        "schedule": schedule,
        "steps": steps,
        "ms": ms,
        "time_over_dense": {key: value / ms["dense"] for key, value in ms.items()},
        "flops_over_dense": statistics.mean(flops(runs["torchdrop"]) for _ in range(counted))
        / dense_flops,
        "saved_bytes_over_dense": statistics.mean(kept_bytes) / dense_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the cases to run")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "torchdrop": torchdrop.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "cases": [],
    }
    header = f"{'model':14} {'mode':6} {'p':>4} {'masked':>7} {'ours':>6} {'FLOPs':>6} {'bytes':>6}"
    print(header)
    for number, case in enumerate(CASES):
        if options.cases and number not in options.cases:
            continue
        result = run_case(case, options.steps)
        results["cases"].append(result)
        over = result["time_over_dense"]
        print(
            f"{result['model']:14} {result['mode']:6} {result['p']:4} {over['masked']:7.2f} "
            f"{over['torchdrop']:6.2f} {result['flops_over_dense']:6.2f} "
            f"{result['saved_bytes_over_dense']:6.2f}",
            flush=True,
        )
        if options.out:
            options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
