"""Train on two CPU processes with the trainers that people use, and report the result of each.

``python benchmarks/soak/strategies.py``. Local batch 1, p=.9: half of the steps drop every branch.
Lightning's FSDPStrategy and Accelerate's FSDP need an accelerator and are not run; Lightning's
ModelParallelStrategy is FSDP2 and runs here.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import torchdrop

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "laws"))
from ranks_worker import WIDTH, Net, everyone, loss, whole

WAYS = ("accelerate", "lightning ddp", "lightning model parallel")


def with_accelerate() -> tuple[torch.nn.Module, torchdrop.Plan]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = Net()
    plan = torchdrop.add_stochastic_depth(net, 0.9, schedule="uniform")
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.01))
    for _ in range(50):
        with accelerator.accumulate(model):
            accelerator.backward(loss(model(torch.randn(1, WIDTH))))
            optimizer.step()
            optimizer.zero_grad()
    return model, plan


def with_lightning(strategy: Any) -> tuple[torch.nn.Module, torchdrop.Plan]:
    import lightning
    from torch.distributed.fsdp import fully_shard

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.plan = torchdrop.add_stochastic_depth(
                self.net, 0.9, schedule="uniform", mode="batch"
            )

        def configure_model(self) -> None:
            if self.device_mesh is not None:
                mesh = self.device_mesh["data_parallel"]
                for block in self.net.blocks:
                    fully_shard(block, mesh=mesh)
                fully_shard(self.net, mesh=mesh)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return loss(self.net(batch[0]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    task = Task()
    data = torch.utils.data.TensorDataset(torch.randn(100, WIDTH))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, torch.utils.data.DataLoader(data, 1))
    return task, task.plan


def worker(way: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if way == "accelerate":
        model, plan = with_accelerate()
    else:
        from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

        model, plan = with_lightning(
            DDPStrategy(process_group_backend="gloo")
            if way == "lightning ddp"
            else ModelParallelStrategy(
                data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
            )
        )
    weights = torch.cat([whole(p).detach().flatten() for p in model.parameters()])
    same = all(torch.equal(other, weights) for other in everyone(weights))
    rates = ", ".join(f"{rate:.2f}" for rate in plan.observed().values())
    print(f"{way}, rank {os.environ['RANK']}: identical {same}, dropped {rates}", flush=True)
    sys.exit(not same)


def main() -> None:
    failed = 0
    for way in WAYS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in ("0", "1"):
            environment = {
                **os.environ,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "soak",  # so that Lightning starts no processes itself
                "TORCHELASTIC_USE_AGENT_STORE": "False",
                "GLOO_SOCKET_IFNAME": "lo",
                "PYTHONWARNINGS": "ignore",
            }
            command = [sys.executable, __file__, way]
            processes.append(subprocess.Popen(command, env=environment))
        failed += sum(process.wait(timeout=300) != 0 for process in processes)
    sys.exit(bool(failed))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(sys.argv[1])
    else:
        main()
