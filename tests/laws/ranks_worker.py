"""One rank of the process groups that test_distributed.py and benchmarks/soak/ranks.py start.

``python ranks_worker.py RANK WORLD STORE REPORT CASES``: runs each case of the file CASES, a name
in CHECKS with its arguments, and writes what it saw. Two ranks that wait for each other in vain end
with an error after TIMEOUT.
"""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import torchdrop
from torchdrop.rows import shared_numbers

TIMEOUT = timedelta(seconds=60)
WIDTH = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).tanh())


class Counting(Block):
    """Sets an attribute of its own in its forward, and so can be dropped as a whole only."""

    times = 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        return x + self.branch(x)


class Net(nn.Module):
    """Blocks between two layers, so that gradients go on where every branch is dropped."""

    def __init__(
        self, depth: int = 4, reentrant: bool | None = None, block: type[Block] = Block
    ) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def masked(net: Net, x: Tensor, kept: list[list[int]], rates: list[float]) -> Tensor:
    """The dense network with the same rows kept, by multiplication."""
    x = net.stem(x)
    for block, rows, p in zip(net.blocks, kept, rates, strict=True):
        weight = torch.zeros(len(x), 1, dtype=x.dtype)
        weight[rows] = 1 / (1 - p) if p < 1 else 0.0
        x = x + weight * block.branch(x)
    return net.head(x)


def loss(out: Tensor) -> Tensor:
    # bounded: with p=.9 kept branches are multiplied by 10, four times, and training would explode
    return out.tanh().square().mean() if len(out) else out.sum()


def everyone(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def shard(net: nn.Module) -> nn.Module:
    for block in net.blocks:
        fully_shard(block)
    return fully_shard(net)


def collectives() -> int:
    return dist.group.WORLD._get_sequence_number_for_group()


def train(
    wrapper: str,
    mode: str,
    p: float,
    batch: int | list[int],
    steps: int,
    *,
    sync_ranks: bool | None = None,
    seeds: str = "apart",
    reentrant: bool | None = None,
    static_graph: bool = False,
    accumulate: int = 1,
    zero: bool = False,
    attach: bool = True,
    whole_blocks: bool = False,
) -> dict[str, Any]:
    """Training steps; each gradient against that of one process with the same rows kept."""
    torch.manual_seed(0)
    net = Net(reentrant=reentrant, block=Counting if whole_blocks else Block).double()
    plain = copy.deepcopy(net)
    plan = None
    if attach:
        plan = torchdrop.add_stochastic_depth(
            net,
            p,
            schedule="uniform",
            mode=mode,
            sync_ranks=sync_ranks,
            example_inputs=torch.ones(2, WIDTH, dtype=torch.float64) if whole_blocks else None,
        )
    model: Any
    if wrapper == "ddp":
        model = DistributedDataParallel(net, static_graph=static_graph)
    else:
        model = shard(net)
    optimizer: Any
    if zero:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(1 if seeds == "alike" else 1 + dist.get_rank())
    worst, decisions, missing, dropped = 0.0, [], 0, []
    sizes = [batch] if isinstance(batch, int) else batch
    generator = torch.Generator().manual_seed(1000 * dist.get_rank())
    before = collectives()
    for step in range(steps):
        optimizer.zero_grad()
        seen = []
        for micro in range(accumulate):
            # sizes go round, and differ between ranks where several are given
            size = sizes[(step + dist.get_rank()) % len(sizes)]
            x = torch.randn(size, WIDTH, dtype=torch.float64, generator=generator)
            last = micro == accumulate - 1
            waits: Any = nullcontext()
            if wrapper == "ddp" and not last:
                waits = model.no_sync()
            elif wrapper == "fsdp":
                model.set_requires_gradient_sync(last)
            with waits:
                (loss(model(x)) / accumulate).backward()
            kept = plan.last_kept() if plan else {}
            rows = [kept[f"blocks.{i}"].tolist() for i in range(len(net.blocks))] if plan else []
            seen.append((x, rows))
            decisions.append([[len(r), hash(tuple(r)) % 997] for r in rows])
            dropped += [len(x) - len(r) for r in rows]
        used = collectives()
        gradients = [None if q.grad is None else whole(q.grad) for q in model.parameters()]
        missing += sum(g is None for g in gradients)
        if plan:
            with torch.no_grad():
                for mine, theirs in zip(plain.parameters(), net.parameters(), strict=True):
                    mine.copy_(whole(theirs))
            plain.zero_grad()
            ranks = everyone(seen)
            for micro in range(accumulate):
                parts = [rank[micro] for rank in ranks]
                offsets = [sum(len(x) for x, _ in parts[:r]) for r in range(len(parts))]
                rows = [
                    [o + i for o, (_, rows) in zip(offsets, parts, strict=True) for i in rows[b]]
                    for b in range(len(net.blocks))
                ]
                out = masked(plain, torch.cat([x for x, _ in parts]), rows, [p] * len(net.blocks))
                outs = out.split([len(x) for x, _ in parts])
                (sum(loss(o) for o in outs) / len(outs) / accumulate).backward()
            for mine, theirs in zip(gradients, plain.parameters(), strict=True):
                if mine is not None:
                    size = max(1.0, float(theirs.grad.abs().max()))
                    worst = max(worst, float((mine - theirs.grad).abs().max()) / size)
        before += collectives() - used
        optimizer.step()
    counted = collectives() - before
    weights = torch.cat([whole(q).detach().flatten() for q in model.parameters()])
    return {
        "identical": all(torch.equal(w, weights) for w in everyone(weights)),
        "finite": bool(weights.isfinite().all()),
        "gradient_error": worst,
        "missing": missing,
        "decisions": decisions,
        "dropped": sum(dropped) / max(len(dropped), 1),
        "actions": sorted({r.action for r in plan.blocks}) if plan else [],
        "collectives": counted,
    }


def uneven() -> dict[str, Any]:
    """Rank 0 has two batches more, under Join; then a new seed, and all decide alike again."""
    torch.manual_seed(0)
    net = Net()
    plan = torchdrop.add_stochastic_depth(net, 0.5, schedule="uniform", mode="batch")
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    report: dict[str, Any] = {"epochs": []}
    for epoch in range(2):
        torch.manual_seed(epoch)
        decisions = []
        with Join([model]):
            for _ in range(6 if dist.get_rank() == 0 else 4):
                optimizer.zero_grad()
                loss(model(torch.randn(3, WIDTH))).backward()
                optimizer.step()
                decisions.append([len(rows) for rows in plan.last_kept().values()])
        report["epochs"].append(decisions)
    weights = torch.cat([q.detach().flatten() for q in model.parameters()])
    report["identical"] = all(torch.equal(w, weights) for w in everyone(weights))
    return report


def reseeded() -> dict[str, Any]:
    """Two runs from the same seed, in the middle of a process, and one from another."""
    torch.manual_seed(0)
    runs: dict[str, Any] = {}
    for mode in ("row", "batch"):
        net = Net()
        plan = torchdrop.add_stochastic_depth(net, 0.5, schedule="uniform", mode=mode)
        model = DistributedDataParallel(net)
        runs[mode] = []
        for seed in (3, 4, 3):
            torch.manual_seed(seed)
            run = []
            for _ in range(10):
                model(torch.randn(6, WIDTH))
                run.append([rows.tolist() for rows in plan.last_kept().values()])
            runs[mode].append(run)
    return runs


def resumed() -> dict[str, Any]:
    """A run that was saved in the middle of an epoch goes on in what is like a new process."""
    report: dict[str, Any] = {}
    for mode in ("row", "batch"):
        for save in ("all", "no plan"):
            torch.manual_seed(dist.get_rank())
            net = Net()
            plan = torchdrop.add_stochastic_depth(net, 0.5, schedule="uniform", mode=mode)
            model = DistributedDataParallel(net)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
            runs: list[Any] = []
            file = io.BytesIO()
            for step in range(20):
                if step == 12:  # all that a trainer saves
                    state = {"net": net.state_dict(), "generator": torch.get_rng_state()}
                    torch.save(state | {"plan": plan.state_dict()}, file)
                optimizer.zero_grad()
                loss(model(torch.randn(3, WIDTH))).backward()
                optimizer.step()
                runs.append([rows.tolist() for rows in plan.last_kept().values()])
            weights = torch.cat([q.detach().flatten() for q in net.parameters()])
            shared_numbers.shared_numbers.__init__()  # type: ignore[misc]
            torch.manual_seed(1234 + dist.get_rank())
            net = Net()
            plan = torchdrop.add_stochastic_depth(net, 0.1, mode=mode)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            net.load_state_dict(state["net"])
            model = DistributedDataParallel(net)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
            if save == "all":
                plan.load_state_dict(state["plan"])
            else:
                plan.set_p([0.5] * 4)
            torch.set_rng_state(state["generator"])
            again = []
            for _ in range(8):
                optimizer.zero_grad()
                loss(model(torch.randn(3, WIDTH))).backward()
                optimizer.step()
                again.append([rows.tolist() for rows in plan.last_kept().values()])
            mine = torch.cat([q.detach().flatten() for q in net.parameters()])
            same = again == runs[12:] and torch.equal(mine, weights)
            report[f"{mode}, {save}"] = {"same": same, "kept": again}
    return report


def wrapped() -> dict[str, str]:
    """What says no where a model is wrapped already."""
    report = {}
    for name, wrap in {
        "ddp": DistributedDataParallel,
        "inside": lambda net: nn.Sequential(DistributedDataParallel(net), nn.Identity()),
        "fsdp": shard,
        "one shard": lambda net: [fully_shard(net.blocks[1]), net][1],
    }.items():
        model = wrap(Net())
        before = [list(m.__dict__) for m in model.modules()]
        try:
            torchdrop.add_stochastic_depth(model, 0.5)
        except ValueError as error:
            report[name] = str(error)
        assert before == [list(m.__dict__) for m in model.modules()]
    return report


def mixed() -> dict[str, Any]:
    """bfloat16: DDP under autocast with a scaler that meets an overflow, FSDP2 by its policy."""
    report: dict[str, Any] = {}
    for wrapper in ("ddp", "fsdp"):
        for mode in ("row", "batch"):
            for kind in (Block, Counting):
                torch.manual_seed(0)
                net: Any = Net(block=kind)
                plan = torchdrop.add_stochastic_depth(
                    net, 0.9, schedule="uniform", mode=mode, example_inputs=torch.ones(2, WIDTH)
                )
                if wrapper == "ddp":
                    net = DistributedDataParallel(net)
                else:
                    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
                    for block in net.blocks:
                        fully_shard(block, mp_policy=policy)
                    fully_shard(net, mp_policy=policy)
                scaler = torch.amp.GradScaler("cpu", enabled=wrapper == "ddp")
                optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
                start = torch.cat([whole(q).detach().flatten() for q in net.parameters()])
                torch.manual_seed(1 + dist.get_rank())
                dtypes, missing, kept = set(), 0, []
                for step in range(10):
                    optimizer.zero_grad()
                    x = torch.randn(1, WIDTH) * (float("inf") if step == 5 else 1.0)
                    if step == 5 and wrapper == "fsdp":
                        continue
                    with torch.autocast("cpu", torch.bfloat16, enabled=wrapper == "ddp"):
                        out = net(x)
                        value = loss(out.float())
                    scaler.scale(value).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    dtypes.add(str(out.dtype))
                    missing += sum(q.grad is None for q in net.parameters())
                    kept.append([len(rows) for rows in plan.last_kept().values()])
                weights = torch.cat([whole(q).detach().flatten() for q in net.parameters()])
                report[f"{wrapper} {mode} {kind.__name__}"] = {
                    "identical": all(torch.equal(w, weights) for w in everyone(weights)),
                    "finite": bool(weights.isfinite().all()),
                    "moved": not torch.equal(start, weights),
                    "missing": missing,
                    "dtypes": sorted(dtypes),
                    "kept": kept,
                }
    return report


def waiting_forwards() -> dict[str, Any]:
    """Several checkpointed forwards before one backward, with a seed set before each step."""
    torch.manual_seed(0)
    worst = 0.0
    for reentrant in (True, False):
        for reseed in (True, False):
            net, plain = Net(reentrant=reentrant).double(), Net().double()
            plain.load_state_dict(net.state_dict())
            plan = torchdrop.add_stochastic_depth(net, 0.5, schedule="uniform", mode="batch")
            # DDP with reentrant checkpoints takes one backward a forward
            for _ in range(6):
                if reseed:
                    torch.manual_seed(7)
                net.zero_grad(), plain.zero_grad()
                views = [
                    torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(3)
                ]
                outs, kept = [], []
                for x in views:
                    outs.append(net(x))
                    kept.append([rows.tolist() for rows in plan.last_kept().values()])
                sum(loss(out) for out in outs).backward()
                twins = [
                    masked(plain, x, rows, [0.5] * 4) for x, rows in zip(views, kept, strict=True)
                ]
                sum(loss(out) for out in twins).backward()
                for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
                    worst = max(worst, float((mine.grad - theirs.grad).abs().max()))
    return {"gradient_error": worst}


class Sum(torch.autograd.Function):
    """The sum over all ranks, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


class SyncBatchNorm(nn.Module):
    """For the CPU, where torch's own refuses to run: one all_reduce each way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.cat([x.sum(0), x.square().sum(0), x.new_tensor([len(x)])])
        total = Sum.apply(total)
        mean, square = (total[:-1] / total[-1]).split(x.shape[1])
        return (x - mean) / (square - mean.square() + 1e-5).sqrt() * self.weight + self.bias


class Normed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = SyncBatchNorm()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.norm(self.a(x)).tanh())


def waits_inside(what: str, mode: str, layer: bool = False) -> dict[str, Any]:
    """fully_shard or SyncBatchNorm inside a branch: all ranks run it, whatever they decide."""
    torch.manual_seed(0)
    blocks = [Normed() if what == "norm" else Block() for _ in range(4)]
    options: dict[str, Any] = {"mode": mode}
    if mode == "batch":
        options["sync_ranks"] = False  # so that ranks would part, if they were let
    net: Any = nn.Sequential(*blocks)
    plan = None
    if layer:
        net = nn.Sequential(*(torchdrop.StochasticDepth(block, 0.8, **options) for block in blocks))
    else:
        plan = torchdrop.add_stochastic_depth(net, 0.8, schedule="uniform", **options)
    model = net
    if what == "norm":
        model = DistributedDataParallel(net)
    else:
        for block in blocks:
            fully_shard(block.a)
        fully_shard(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    torch.manual_seed(dist.get_rank())
    decisions = []
    for _ in range(12):
        optimizer.zero_grad()
        loss(model(torch.randn(2, WIDTH))).backward()
        optimizer.step()
        if plan:
            decisions.append([len(rows) for rows in plan.last_kept().values()])
    weights = torch.cat([whole(q).detach().flatten() for q in net.parameters()])
    return {
        "identical": all(torch.equal(w, weights) for w in everyone(weights)),
        "decisions": decisions,
        "actions": [[r.action, r.reason] for r in plan.blocks] if plan else [],
    }


class Output(nn.Module):
    """As BertSelfOutput: the addition is in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.b(x) + skip


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(WIDTH, WIDTH), Output()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).tanh(), x)


def split_over_modules() -> dict[str, Any]:
    """Residuals over two modules: sharded with the whole block, or refused."""
    report: dict[str, Any] = {}
    for inner in (False, True):
        net: Any = nn.Sequential(*(Split() for _ in range(3)))
        plan = torchdrop.add_stochastic_depth(net, 0.9, schedule="uniform")
        for block in net:
            fully_shard(block.out if inner else block)
        fully_shard(net)
        try:
            for _ in range(5):
                loss(net(torch.randn(2, WIDTH))).backward()
            report["whole"] = [r.action for r in plan.blocks]
        except RuntimeError as error:
            report["inner"] = str(error)
    return report


def layers_alike() -> dict[str, Any]:
    """StochasticDepth and PathDrop: alike in batch mode, apart in row mode or by order."""
    report = {}
    ran: list[Tensor] = []
    for name, layer in {
        "batch": torchdrop.StochasticDepth(Block(), 0.5),
        "alone": torchdrop.StochasticDepth(Block(), 0.5, sync_ranks=False),
        "row": torchdrop.StochasticDepth(Block(), 0.5, mode="row"),
        "path": torchdrop.PathDrop(0.5, [Block(), Block()], "batch"),
        "path row": torchdrop.PathDrop(0.5, [Block(), Block()], "row"),
    }.items():
        blocks = [layer.module] if hasattr(layer, "module") else list(layer.branches)
        for block in blocks:
            # which rows: they hold their own numbers
            block.register_forward_pre_hook(lambda m, args: ran.append(args[0][:, 0].long()))
        torch.manual_seed(0 if "row" in name else dist.get_rank())
        runs = []
        for _ in range(30):
            ran.clear()
            layer(torch.arange(6.0).view(6, 1).expand(6, WIDTH))
            runs.append([rows.tolist() for rows in ran])
        report[name] = runs
    return report


def gathered() -> dict[str, Any]:
    """A sharded model's weights, gathered, in a plain model that never heard of all this."""
    torch.manual_seed(0)
    net = Net()
    keys = list(net.state_dict())
    torchdrop.add_stochastic_depth(net, 0.5)
    model = shard(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss(model(torch.randn(4, WIDTH))).backward()
        optimizer.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() > 0:
        model.eval()(torch.ones(2, WIDTH))
        return {}
    plain = Net()
    plain.load_state_dict(state)
    x = torch.ones(2, WIDTH)
    return {
        "keys": list(state) == keys,
        "same": torch.equal(plain.eval()(x), model.eval()(x)),
        "differ_from_start": not torch.equal(plain.stem.weight, Net().stem.weight),
    }


def without_zeros() -> dict[str, Any]:
    """The twin: what DDP does where a dropped branch leaves no gradient."""
    torch.manual_seed(0)
    net = Net()
    torchdrop.add_stochastic_depth(net, 1.0, schedule="uniform", zero_grad=False)
    model = DistributedDataParallel(net)
    try:
        for _ in range(2):
            loss(model(torch.randn(2, WIDTH))).backward()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


def tensor_parallel() -> dict[str, Any]:
    """Ranks that split one block work on the same samples: alike in batch mode, else refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    report: dict[str, Any] = {}
    for mode in ("row", "batch"):
        torch.manual_seed(0)
        net = Net().double()
        plan = torchdrop.add_stochastic_depth(net, 0.5, schedule="uniform", mode=mode)
        for block in net.blocks:
            parallelize_module(block, mesh, {"a": ColwiseParallel(), "b": RowwiseParallel()})
        x = torch.ones(4, WIDTH, dtype=torch.float64)
        try:
            for _ in range(8):
                net.zero_grad()
                out = net(x)
                loss(out).backward()
            report[mode] = {
                "outs": everyone(out.tolist()),
                "kept": everyone([len(rows) for rows in plan.last_kept().values()]),
                "missing": [n for n, q in net.named_parameters() if q.grad is None],
            }
        except RuntimeError as error:
            report[mode] = str(error)
    return report


CHECKS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        train,
        uneven,
        reseeded,
        mixed,
        resumed,
        wrapped,
        waiting_forwards,
        waits_inside,
        split_over_modules,
        layers_alike,
        gathered,
        without_zeros,
        tensor_parallel,
    )
}


def main(rank: int, world: int, store: str, report: str, cases: str) -> None:
    torch.set_num_threads(1)
    results = {}
    for number, (name, (check, options)) in enumerate(json.loads(Path(cases).read_text()).items()):
        print(name, flush=True)
        # a group of its own for each, as in a run of its own
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}{number}",
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
        )
        results[name] = CHECKS[check](**options)
        dist.barrier()
        dist.destroy_process_group()
    Path(report).write_text(json.dumps(results))


def start(world: int, cases: dict[str, Any], folder: Path, timeout: float) -> list[dict[str, Any]]:
    """The reports of ``world`` ranks that ran ``cases``, each a process of its own."""
    spec = folder / "cases.json"
    spec.write_text(json.dumps(cases))
    files = [folder / f"rank{rank}.json" for rank in range(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(folder / "store"), file, spec],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=timeout)
            if process.returncode:
                raise RuntimeError(errors)
    finally:
        for process in processes:
            process.kill()
    return [json.loads(file.read_text()) for file in files]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
