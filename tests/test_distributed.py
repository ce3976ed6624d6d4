"""Two processes: nobody waits for a gradient, ranks draw rows of their own or decide alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without torch.distributed"
)

WORKER = """
import json, sys, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
import torchdrop

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.b(self.a(x).tanh())


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


report = {}
for case, options in {
    "row": dict(mode="row"),
    "batch": dict(mode="batch"),
    "alone": dict(mode="batch", sync_ranks=False),
    "checkpoint": dict(mode="batch"),
}.items():
    torch.manual_seed(0)
    net = Checkpointed() if case == "checkpoint" else nn.Sequential(*(Block() for _ in range(4)))
    plan = torchdrop.add_stochastic_depth(net, 0.9, schedule="uniform", **options)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    # ranks seeded alike in row mode, which must not make them drop alike; apart in batch mode
    torch.manual_seed(1 if case == "row" else 1 + rank)
    decisions = []
    for step in range(30):
        x = torch.randn(1 if step % 2 else 8, 4)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if len(x) == 8:
            decisions += [sorted(rows.tolist()) for rows in plan.last_kept().values()]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(others, weights)
    report[case] = {
        "identical": bool(torch.equal(others[0], others[1])),
        "finite": bool(weights.isfinite().all()),
        "decisions": decisions,
    }
json.dump(report, open(out, "w"))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "worker.py"
    script.write_text(WORKER)
    files = [folder / f"rank{rank}.json" for rank in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder / "store"), str(files[rank])],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [json.loads(Path(file).read_text()) for file in files]


@pytest.mark.parametrize("case", ["row", "batch", "alone", "checkpoint"])
def test_nobody_hangs_and_parameters_stay_identical(ranks: list[dict[str, Any]], case: str) -> None:
    assert all(rank[case]["identical"] and rank[case]["finite"] for rank in ranks)


def test_rows_differ_between_ranks_that_were_seeded_alike(ranks: list[dict[str, Any]]) -> None:
    mine, theirs = (rank["row"]["decisions"] for rank in ranks)
    both = [(a, b) for a, b in zip(mine, theirs, strict=True) if a and b]
    assert len(both) > 15
    assert sum(a == b for a, b in both) < 10  # one row of eight: an eighth of them by chance


@pytest.mark.parametrize("case", ["batch", "checkpoint"])
def test_batch_mode_decides_alike_whatever_the_seeds(
    ranks: list[dict[str, Any]], case: str
) -> None:
    mine, theirs = (rank[case]["decisions"] for rank in ranks)
    assert mine == theirs
    assert [] in mine
    assert list(range(8)) in mine


def test_without_sync_each_rank_decides_for_itself(ranks: list[dict[str, Any]]) -> None:
    """The twin: ranks that were seeded apart differ where nothing keeps them together."""
    mine, theirs = (rank["alone"]["decisions"] for rank in ranks)
    assert mine != theirs
