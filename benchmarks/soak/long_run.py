"""Run 20,000 small training steps; check memory, sizes of caches, and the rates really dropped.

A residual network is trained with rates that change in every step (a schedule over training: they
rise and fall again), with batches of varying size (a partial last batch, as from a data loader, and
the sizes of bucketing by length) and of varying length. The script checks

* resident memory: the slope of a least-squares line over the second half of the run, in bytes a
  step, has to be below ``--bound`` (64; leaking one small tensor a step would give 100 and more);
* caches: generated forwards, dtypes, decisions and DropBlock's constants are counted throughout,
  and must not be larger after the run than after its first twentieth;
* rates: for each branch, dropped rows minus expected ones, in standard deviations of the sampler's
  distribution; two-sided at alpha 1e-6 over all branches.

    python benchmarks/soak/long_run.py --steps 20000 --out runs/long_run.json
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.layers import drop_block_gamma
from torchdrop.rows import in_graph
from torchdrop.rows.shared_numbers import shared_numbers
from torchdrop.running.block_site import sites_of

ALPHA = 1e-6
SIZES = (16, 16, 16, 5, 1, 9, 12, 7)
LENGTHS = (6, 9, 13)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


def network() -> nn.Module:
    """Four blocks on (batch, length, width), and a layer that caches constants by shape."""
    return nn.Sequential(*[Block(8) for _ in range(4)], torchdrop.DropBlock1d(0.1, 3))


def rate(step: int, steps: int) -> float:
    """Return the rate: up to .5 over the first half of training, down to .1 over the second."""
    progress = step / steps
    return 0.5 * 2 * progress if progress < 0.5 else 0.5 - 0.4 * (2 * progress - 1)


def caches(model: nn.Module) -> dict[str, int]:
    """Return the sizes of everything that is kept from call to call."""
    sites = sites_of(model)
    found = {
        "programs": sum(len(s.train) + len(s.evaluate) for s in sites),
        "dtypes": sum(len(b.dtypes) for s in sites for b in s.branches),
        "drop_block": sum(
            f.cache_info().currsize
            for f in vars(drop_block_gamma).values()
            if hasattr(f, "cache_info")
        ),
        "attributes": sum(len(m.__dict__) for m in model.modules()),
        "calls": sum(len(p.seen or ()) for s in sites for p in (*s.train, *s.evaluate)),
        "numbers of ranks": len(shared_numbers._streams) + len(shared_numbers._number_of_token),
        "branches in graphs": len(in_graph._shares),
    }
    return found


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    file = Path("/proc/self/statm")  # Linux
    return int(file.read_text().split()[1]) * 4096 if file.exists() else 0


def slope(points: list[tuple[int, int]]) -> float:
    """Return the slope of the least-squares line."""
    n = len(points)
    x = sum(p[0] for p in points) / n
    y = sum(p[1] for p in points) / n
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def run(steps: int, mode: str, sampling: str, leak: list | None = None, every: int = 50) -> dict:
    torch.manual_seed(0)
    model = network()
    plan = torchdrop.add_stochastic_depth(model, 0.0, mode=mode, sampling=sampling)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    names = [b.name for r in plan.blocks for b in r.branches]
    depth = len(names)
    excess, variance = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    memory: list[tuple[int, int]] = []
    sizes: list[dict[str, int]] = []
    began = time.process_time()
    for step in range(steps):
        p = rate(step, steps)
        plan.set_p(p)
        batch = SIZES[step % len(SIZES)]
        length = LENGTHS[step // len(SIZES) % len(LENGTHS)]
        x = torch.randn(batch, length, 8)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if leak is not None:
            leak.append(x.new_zeros(64))
        for index, (name, kept) in enumerate(plan.last_kept().items()):
            asked = p * (index + 1) / depth
            excess[name] += batch - len(kept) - batch * asked
            if mode == "batch":
                variance[name] += batch**2 * asked * (1 - asked)
            elif sampling == "independent":
                variance[name] += batch * asked * (1 - asked)
            else:
                rest = math.modf(batch * (1 - asked))[0]
                variance[name] += rest * (1 - rest)
        if step % every == every - 1:
            gc.collect()
            memory.append((step, resident()))
            sizes.append(caches(model))
    observed = plan.observed()
    z = {name: excess[name] / math.sqrt(variance[name]) for name in names}
    half = memory[len(memory) // 2 :]
    return {
        "mode": mode,
        "sampling": sampling,
        "steps": steps,
        "cpu_s": round(time.process_time() - began, 1),
        "resident_first_mb": round(memory[len(memory) // 20][1] / 1e6, 1),
        "resident_last_mb": round(memory[-1][1] / 1e6, 1),
        "slope_bytes_a_step": round(slope(half), 2),
        "caches_early": sizes[max(len(sizes) // 20, 1) - 1],
        "caches_late": sizes[-1],
        "observed": {name: round(value, 5) for name, value in observed.items()},
        "z": {name: round(value, 2) for name, value in z.items()},
        "z_bound": round(-NormalDist().inv_cdf(ALPHA / 2 / depth), 2),
    }


def sound(found: dict, bound: float) -> bool:
    return (
        found["slope_bytes_a_step"] < bound
        and found["caches_late"] == found["caches_early"]
        and all(abs(z) < found["z_bound"] for z in found["z"].values())
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--bound", type=float, default=64.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for mode, sampling in (("row", "exact"), ("row", "independent"), ("batch", "exact")):
        found.append(run(options.steps, mode, sampling))
        print(json.dumps(found[-1]), flush=True)
    # The twin of the check: it has to notice a run that keeps one small tensor a step.
    leaking = run(options.steps // 4, "row", "exact", leak=[])
    seen = not sound(leaking, options.bound)
    print("leak of 256 bytes a step:", leaking["slope_bytes_a_step"], "seen" if seen else "MISSED")
    good = all(sound(each, options.bound) for each in found) and seen
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        versions = {"torchdrop": torchdrop.__version__, "torch": torch.__version__}
        content = {"sound": good, "runs": found, "leaking": leaking, "versions": versions}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
