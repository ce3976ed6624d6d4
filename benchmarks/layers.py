"""Compare the layers with those of other libraries: medians of alternating runs in one process.

    python benchmarks/layers.py --out runs/layers.json

Prints one line for each comparison: milliseconds (median and quartiles) of every contestant, and
the ratios that the documentation claims. Libraries that are not installed are left out and named.
A ratio measured on a busy machine means little; the load before and after is recorded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from machine import processor, version
from torch.profiler import ProfilerActivity, profile

from torchdrop import functional as F
from torchdrop import layers

Contestants = dict[str, Callable[[], object]]


def peer(name: str):
    """Return a module of another library, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def in_turn(contestants: Contestants, runs: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of each; runs alternate, so that a busy moment affects all alike."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(runs + 2):
        for name, f in contestants.items():
            start = time.perf_counter()
            result = f()
            if i >= 2:
                taken[name].append(1e3 * (time.perf_counter() - start))
            del result
    found = {}
    for name, times in taken.items():
        low, _, high = quantiles(times, n=4)
        found[name] = {"median": median(times), "low": low, "high": high, "least": min(times)}
    return found


def drop_path_add(runs: int) -> tuple[dict, dict]:
    drop = peer("timm.layers.drop")
    ops = peer("torchvision.ops")
    skip, branch = (torch.randn(64, 197, 384) for _ in range(2))
    forward: Contestants = {
        "skip + branch": lambda: skip + branch,
        "drop_path_add": lambda: F.drop_path_add(skip, branch, 0.1),
    }
    if drop:
        forward["skip + timm drop_path"] = lambda: skip + drop.drop_path(branch, 0.1, True)
    if ops:
        forward["skip + torchvision"] = lambda: skip + ops.stochastic_depth(branch, 0.1, "row")
    leaves = [t.clone().requires_grad_() for t in (skip, branch)]
    grad = torch.ones_like(skip)

    def both(f: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(*leaves), leaves, grad)

    name = "drop_path_add, forward and backward"
    forward[name] = both(lambda s, b: F.drop_path_add(s, b, 0.1))
    theirs = "skip + timm drop_path, forward and backward"
    if drop:
        forward[theirs] = both(lambda s, b: s + drop.drop_path(b, 0.1, True))
    found = in_turn(forward, runs)
    ratios = {"forward, of the plain sum (at most 1.15)": ("drop_path_add", "skip + branch")}
    if drop:
        ratios["forward and backward, of timm (at most .8)"] = (name, theirs)
    return found, ratios


def drop_block(runs: int) -> tuple[dict, dict]:
    x = torch.randn(32, 256, 28, 28)
    contestants: Contestants = {
        "per channel": lambda: F.drop_block2d(x, 0.1, 7),
        "shared": lambda: F.drop_block2d(x, 0.1, 7, per_channel=False),
    }
    ratios = {}
    ops, drop = peer("torchvision.ops"), peer("timm.layers.drop")
    if ops:
        contestants["torchvision"] = lambda: ops.drop_block2d(x, 0.1, 7)
        ratios["torchvision, of per channel (at least 8)"] = ("torchvision", "per channel")
    if drop:
        contestants["timm, per channel"] = lambda: drop.drop_block_2d(
            x, 0.1, 7, couple_channels=False
        )
        contestants["timm, shared"] = lambda: drop.drop_block_2d(x, 0.1, 7)
        ratios["shared, of timm (at most 1)"] = ("shared", "timm, shared")
    return in_turn(contestants, runs), ratios


def cutout(runs: int) -> tuple[dict, dict]:
    x = torch.rand(256, 3, 32, 32)
    contestants: Contestants = {
        "cutout": lambda: F.cutout(x, 16),
        "cutout, 4 holes": lambda: F.cutout(x, 8, 4),
    }
    ratios = {}
    v2, kornia = peer("torchvision.transforms.v2"), peer("kornia.augmentation")
    if v2:
        erase = v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))
        contestants["v2.RandomErasing in a loop"] = lambda: torch.stack([erase(i) for i in x])
        ratios["the loop, of cutout (at least 20)"] = ("v2.RandomErasing in a loop", "cutout")
    if kornia:
        batch = kornia.RandomErasing(scale=(0.25, 0.25), ratio=(1.0, 1.0), p=1.0)
        contestants["kornia.RandomErasing"] = lambda: batch(x)
        ratios["kornia, of cutout (at least 1.5)"] = ("kornia.RandomErasing", "cutout")
    return in_turn(contestants, runs), ratios


def allocated(f: Callable[[], object]) -> int:
    """Return the largest number of bytes allocated at one time while ``f`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = f()
    del result
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def memory() -> dict[str, float]:
    """Return each layer's peak memory over the size of its input: at most 2, output and mask."""
    x = torch.randn(32, 256, 28, 28, requires_grad=True)
    made = (
        layers.DropPath(0.1),
        layers.DropBlock2d(0.1),
        layers.DropBlock2d(0.1, per_channel=False),
        layers.DropBlock2d(0.1, scale="count"),
        layers.DropBlock2d(0.1, scale="unit"),
        layers.SpatialDropout(0.1),
        layers.GaussianDropout(0.1),
        layers.UniformDropout(0.1),
        layers.ShakeDrop(0.1),
        layers.Cutout(14),
        layers.Cutout(14, fill="noise"),
    )
    found = {repr(layer): allocated(lambda layer=layer: layer(x)) / x.nbytes for layer in made}
    join = layers.PathDrop(0.1)
    found[f"{join} of three inputs"] = allocated(lambda: join(x, x, x)) / x.nbytes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=41)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    about = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            name: version(name) for name in ("torchdrop", "torch", "torchvision", "timm", "kornia")
        },
        "python": platform.python_version(),
        "machine": platform.platform(),
        "processor": processor(),
        "threads": args.threads,
        "runs": args.runs,
        "dtype": "float32",
        "load before": os.getloadavg(),
    }
    print(f"{about['processor']}, {args.threads} threads, load {about['load before'][0]:.2f}")
    results = {}
    for compare in (drop_path_add, drop_block, cutout):
        found, claims = compare(args.runs)
        ratios = {
            what: {
                "of medians": found[a]["median"] / found[b]["median"],
                "of the least": found[a]["least"] / found[b]["least"],
            }
            for what, (a, b) in claims.items()
        }
        results[compare.__name__] = {"milliseconds": found, "ratios": ratios}
        print(f"\n{compare.__name__}")
        for name, t in found.items():
            print(f"  {name:46}{t['median']:9.2f} ms  ({t['low']:.2f} to {t['high']:.2f})")
        for what, ratio in ratios.items():
            print(f"  {what:46}{ratio['of medians']:9.2f}  (least: {ratio['of the least']:.2f})")
    results["memory"] = memory()
    print("\npeak of memory, in bytes of the input (at most 2)")
    for name, times in results["memory"].items():
        print(f"  {name:66}{times:6.2f}")
    about["load after"] = os.getloadavg()
    missing = [name for name, found in about["versions"].items() if found is None]
    if missing:
        print(f"\nnot installed: {', '.join(missing)}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
