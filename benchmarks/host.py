"""Measure what a call of a block costs the host: Python, dispatches and autograd, no arithmetic.

    python benchmarks/host.py --json benchmarks/results/host.json
    python benchmarks/host.py --network vit --row uniform --processes 1
    python benchmarks/host.py --network vit --shapes

The networks are so small that arithmetic takes no time worth mentioning: a step takes as long as
the host needs to launch it. In each round every contestant runs one forward and one backward pass,
so that a busy moment affects all alike. Each round has another order, because a step takes longer
after some contestants than after others. What a branch adds is the median over the rounds of the
difference to the dense model in the same round, for each branch. It is given in microseconds, and
in units of what timm's DropPath adds at the same places in the same rounds: this unit itself
doubles when the machine is busy. Each figure is the median of several processes.

Dispatches do not depend on how busy the machine is: how many operations of ATen a branch adds to a
forward and backward pass, as the profiler of PyTorch counts them (nested ones included).

Rows:

* ``uniform``, ``linear``: row mode, p = .5 everywhere; and p up to .2, linear over depth.
* ``keeps all``: row mode with p = 1e-9. It acts, but keeps every row.
* ``mask``: as ``uniform`` with ``compute="mask"``.
* ``batch``: batch mode, p up to .2, linear over depth.
* ``block .5``, ``block .1``: ``unit="block"``, one decision for both branches of a block, at one
  rate everywhere. The figures are still for each branch.
* ``evaluation``: the forward of the model in evaluation mode, against the dense model's. The unit
  is still what DropPath adds in training.

Variants: float32; bfloat16 under autocast; ``line 0`` with own autograd functions for tensors of
any size, as for large tensors; ``group`` inside a process group of two ranks (gloo).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import socket
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import processor, version
from torch import nn
from torch.profiler import ProfilerActivity, profile

import torchdrop
from torchdrop.rows import take_and_add

WIDTH, DEPTH, BATCH = 16, 12, 16
UNIT = "DropPath"

# The arguments of add_stochastic_depth, and the network's rate for its own DropPath layers.
ROWS: dict[str, dict[str, Any] | None] = {
    UNIT: None,
    "uniform": {"p": 0.5, "schedule": "uniform"},
    "linear": {"p": 0.2},
    "keeps all": {"p": 1e-9},
    "mask": {"p": 0.5, "schedule": "uniform", "compute": "mask"},
    "batch": {"p": 0.2, "mode": "batch"},
    "block .5": {"p": 0.5, "schedule": "uniform", "unit": "block"},
    "block .1": {"p": 0.1, "schedule": "uniform", "unit": "block"},
    "evaluation": {"p": 0.5},
}
VARIANTS = ("float32", "bfloat16", "line 0", "group")


def drop_path(p: float) -> nn.Module:
    from timm.layers import DropPath

    return DropPath(p)


class ViT(nn.Module):
    """Twelve blocks of timm's VisionTransformer."""

    def __init__(self, p: float) -> None:
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        self.model = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=2, num_classes=10
        )
        for block in self.model.blocks if p else ():
            block.drop_path1, block.drop_path2 = drop_path(p), drop_path(p)

    @staticmethod
    def inputs() -> torch.Tensor:
        return torch.randn(BATCH, 3, 32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class ResNet(nn.Module):
    """Twelve blocks of timm's ResNet, of eight channels."""

    def __init__(self, p: float) -> None:
        from timm.models.resnet import BasicBlock
        from timm.models.resnet import ResNet as TimmResNet

        super().__init__()
        self.model = TimmResNet(
            BasicBlock, (3, 3, 3, 3), num_classes=10, stem_width=8, channels=(8, 8, 8, 8)
        )
        for module in self.model.modules() if p else ():
            if isinstance(module, BasicBlock):
                module.drop_path = drop_path(p)

    @staticmethod
    def inputs() -> torch.Tensor:
        return torch.randn(BATCH, 3, 32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Llama(nn.Module):
    """Twelve layers of transformers' Llama, which are called with keyword arguments."""

    def __init__(self, p: float) -> None:
        import transformers

        super().__init__()
        self.model = transformers.LlamaModel(
            transformers.LlamaConfig(
                hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=DEPTH,
                num_attention_heads=2, num_key_value_heads=2, vocab_size=99, use_cache=False,
                pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
        for layer in self.model.layers if p else ():
            layer.self_attn.o_proj = nn.Sequential(layer.self_attn.o_proj, drop_path(p))
            layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, drop_path(p))

    @staticmethod
    def inputs() -> torch.Tensor:
        return torch.randint(3, 99, (BATCH, 8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens).last_hidden_state


NETWORKS = {"vit": ViT, "resnet": ResNet, "llama": Llama}


def build(network: str, row: str) -> nn.Module:
    """Return a network with what ``row`` says."""
    torch.manual_seed(0)
    model = NETWORKS[network](0.5 if row == UNIT else 0.0)
    options = ROWS.get(row)
    if options is not None:
        torchdrop.add_stochastic_depth(model, example_inputs=model.inputs(), **options)
    return model


def dispatches(step: Callable[[], None]) -> int:
    """Return how many operations of ATen a step dispatches, on average over some steps."""
    steps = 20
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    # not key_averages(), which takes seconds to arrange them
    events = found.profiler.kineto_results.events()
    return sum(event.name().startswith("aten::") for event in events) / steps


def count_shapes(network: str, row: str, steps: int = 1000) -> dict[str, int]:
    """Return how many shapes of inputs a forward has in many steps: all, and most of one layer.

    cuDNN, cuBLAS and oneDNN plan anew for each new shape.
    """
    model, x = build(network, row).train(), NETWORKS[network].inputs()
    found: dict[str, set[Any]] = {}
    for name, module in model.named_modules():
        if not list(module.children()) and list(module.parameters()):

            def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                found.setdefault(name, set()).add(tuple(args[0].shape))

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        for _ in range(steps):
            model(x)
    return {"all": len(set().union(*found.values())), "of one layer": max(map(len, found.values()))}


def measure(network: str, rows: Iterable[str], variant: str, rounds: int) -> dict[str, Any]:
    """Return the times of all contestants in one process, in microseconds."""
    torch.set_num_threads(1)
    if variant == "line 0":
        take_and_add.MIN_ELEMENTS_FOR_OWN_FUNCTION = 0
    precise = variant != "bfloat16"
    autocast = nullcontext if precise else lambda: torch.autocast("cpu", torch.bfloat16)
    names = ["dense", UNIT, *(row for row in rows if row != UNIT)]
    models = {name: build(network, name) for name in names}
    x = NETWORKS[network].inputs()
    branches = sum(len(r.branches) for r in torchdrop.find_residuals(models["dense"], x))
    if "evaluation" in models:
        models["dense in evaluation"] = build(network, "dense")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}

    def step(name: str) -> tuple[float, float]:
        model = models[name].train("evaluation" not in name)
        model.zero_grad()
        start = time.perf_counter()
        if not model.training:
            with torch.no_grad(), autocast():
                model(x)
            return time.perf_counter() - start, 0.0
        with autocast():
            loss = model(x).square().mean()
        middle = time.perf_counter()
        loss.backward()
        return middle - start, time.perf_counter() - middle

    order, shuffle = list(times), random.Random(0).shuffle
    for number in range(rounds + 5):
        shuffle(order)
        for name in order:
            taken = step(name)
            if number >= 5:
                times[name].append(taken)
    found: dict[str, Any] = {"branches": branches}
    counts = {name: dispatches(lambda name=name: step(name)) for name in models}
    for name in names[1:]:
        base = times["dense in evaluation" if name == "evaluation" else "dense"]
        pairs = list(zip(times[name], base, strict=True))
        forward, backward = (
            1e6 * median(mine[i] - other[i] for mine, other in pairs) / branches for i in (0, 1)
        )
        both = 1e6 * median(sum(mine) - sum(other) for mine, other in pairs) / branches
        base_name = "dense in evaluation" if name == "evaluation" else "dense"
        found[name] = {
            "forward_us": forward,
            "backward_us": backward,
            "us": both,
            "time": median(sum(mine) / sum(other) for mine, other in pairs),
            "dispatches": (counts[name] - counts[base_name]) / branches,
        }
    for name in names[1:]:
        found[name]["units"] = found[name]["us"] / found[UNIT]["us"]
    return found


def run_process(job: tuple[Any, ...], rank: int, port: int, results: Any) -> None:
    """Measure in a process of its own; with ranks, only the first one reports."""
    warnings.simplefilter("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    if job[2] == "group":
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = measure(*job)
    if rank == 0:
        results.put(found)
    if job[2] == "group":
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def in_processes(job: tuple[Any, ...], processes: int) -> dict[str, Any]:
    """Return the median of each figure over several processes."""
    context = multiprocessing.get_context("spawn")
    runs = []
    for _ in range(processes):
        results, port = context.Queue(), free_port()
        ranks = range(2 if job[2] == "group" else 1)
        started = [context.Process(target=run_process, args=(job, r, port, results)) for r in ranks]
        for process in started:
            process.start()
        runs.append(results.get(timeout=1200))
        for process in started:
            process.join()
    found: dict[str, Any] = {"branches": runs[0]["branches"]}
    for row in runs[0]:
        if row != "branches":
            found[row] = {k: median(run[row][k] for run in runs) for k in runs[0][row]}
            units = [run[row]["units"] for run in runs]
            found[row] |= {"units_least": min(units), "units_most": max(units)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--row", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--shapes", action="store_true", help="count shapes instead of time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.shapes:
        torch.set_num_threads(1)
        for network in args.network:
            for row in ("dense", *args.row):
                print(network, row, count_shapes(network, row), flush=True)
        return
    figures: dict[str, Any] = {}
    header = ("", "T", "forward", "backward", "us", "x DropPath", "least", "most", "dispatches")
    for network in args.network:
        for variant in args.variant:
            job = (network, args.row, variant, args.rounds)
            found = figures[f"{network}, {variant}"] = in_processes(job, args.processes)
            print(f"\n{network}, {variant}: {found['branches']} branches")
            print("{:12}{:>7}{:>9}{:>9}{:>8}{:>11}{:>7}{:>7}{:>11}".format(*header))
            for row, f in found.items():
                if row != "branches":
                    print(
                        f"{row:12}{f['time']:7.3f}{f['forward_us']:9.1f}{f['backward_us']:9.1f}"
                        f"{f['us']:8.1f}{f['units']:11.2f}{f['units_least']:7.2f}"
                        f"{f['units_most']:7.2f}{f['dispatches']:11.1f}",
                        flush=True,
                    )
    if args.json:
        facts = {
            "processor": processor(),
            "python": platform.python_version(),
            "processes": args.processes,
            "rounds": args.rounds,
            **{name: version(name) for name in ("torch", "timm", "transformers", "torchdrop")},
        }
        args.json.write_text(json.dumps({"facts": facts, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
