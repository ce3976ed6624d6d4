"""The callback of Lightning: where it acts, what it counts and logs, and that a run resumes."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchdrop
from small_nets import net
from torchdrop.schedules import over_time

pytest.importorskip("lightning.pytorch")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from torchdrop.integrations.lightning import StochasticDepth

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
]

RULE = over_time.ramp(0.0, 0.8)


class Module(LightningModule):
    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.model = net(3)
        self.count = optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        loss: Tensor = self.model(x).square().mean()
        if not self.automatic_optimization:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        made = [torch.optim.SGD(self.model[i].parameters(), lr=0.1) for i in range(self.count)]
        return made if self.count > 1 else torch.optim.SGD(self.parameters(), lr=0.1)


class Rates(Callback):
    """Notes the rate of the deepest block in each batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(torchdrop.get_plan(pl_module).blocks[-1].p)


def data(batches: int = 4) -> DataLoader[Any]:
    x = torch.randn(batches * 8, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=8, shuffle=True)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    options = {"max_epochs": 2, "devices": 1, "logger": False, **options}
    options = {"enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_the_rate_follows_the_rule_step_by_step(tmp_path: Path) -> None:
    rates, module = Rates(), Module()
    trainer(tmp_path, StochasticDepth(over_time=RULE), rates).fit(module, data())
    assert rates.seen == pytest.approx([RULE(step / 8) for step in range(8)])
    assert torchdrop.has_stochastic_depth(module)
    assert "ramp(start=0.0, end=0.8), now at progress 0.875" in repr(torchdrop.get_plan(module))


def test_without_a_rule_the_rates_are_those_of_p(tmp_path: Path) -> None:
    rates, module = Rates(), Module()
    callback = StochasticDepth(0.6, schedule="uniform", mode="batch")
    trainer(tmp_path, callback, rates).fit(module, data())
    assert rates.seen == [0.6] * 8
    assert "batch mode" in repr(torchdrop.get_plan(module))


def test_accumulated_batches_share_a_rate(tmp_path: Path) -> None:
    rates = Rates()
    callback = StochasticDepth(over_time=RULE)
    trainer(tmp_path, callback, rates, accumulate_grad_batches=2).fit(Module(), data(3))
    # three batches an epoch: two steps, the second one of a single batch
    assert rates.seen == pytest.approx([RULE(t) for t in (0, 0, 0.25, 0.5, 0.5, 0.75)])


@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 16}])
def test_several_optimizers_count_one_step_a_batch(options: dict[str, Any], tmp_path: Path) -> None:
    rates = Rates()
    trainer(tmp_path, StochasticDepth(over_time=RULE), rates, **options).fit(Module(2), data())
    assert rates.seen == pytest.approx([RULE(step / 8) for step in range(8)])


def test_what_ends_first_counts(tmp_path: Path) -> None:
    rates = Rates()
    trainer(tmp_path, StochasticDepth(over_time=RULE), rates, max_epochs=5, max_steps=4).fit(
        Module(), data()
    )
    assert rates.seen == pytest.approx([RULE(step / 4) for step in range(4)])


def test_a_rule_over_time_needs_an_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither max_steps, nor max_epochs"):
        trainer(
            tmp_path, StochasticDepth(over_time=RULE), max_epochs=-1, max_time="00:00:00:05"
        ).fit(Module(), data())
    with pytest.raises(TypeError, match="over_time has to be a function"):
        StochasticDepth(over_time=0.5)  # type: ignore[arg-type]


class TwoBranches(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x).tanh()
        return x + self.b(x).tanh()


@pytest.mark.parametrize("unit", ["branch", "block"])
def test_it_logs_the_rates_and_what_they_skip(unit: str, tmp_path: Path) -> None:
    class Plain(Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net(3, block=TwoBranches)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.model(x)
            return out

    loop = trainer(
        tmp_path,
        StochasticDepth(0.5, schedule="uniform", unit=unit, example_inputs=torch.randn(4, 6)),
        max_epochs=3,
    )
    loop.fit(Plain(), data())
    logged = {k.removeprefix("stochastic_depth/"): float(v) for k, v in loop.logged_metrics.items()}
    assert logged["p"] == logged["observed"] == 0.5
    assert logged["observed_low"] < 0.5 < logged["observed_high"]
    assert logged["flops_skipped"] == pytest.approx(0.5)


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


class Stop(Callback):
    """Ends a run after some epochs."""

    def __init__(self, epochs: int | None) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def fitted(
    folder: Path, epochs: int, stop: int | None, *, restore: bool = True, **more: Any
) -> list[Tensor]:
    """The weights after a run, which is stopped after ``stop`` epochs and resumed."""

    def parts() -> tuple[Module, StochasticDepth, ModelCheckpoint]:
        torch.manual_seed(0)
        callback = StochasticDepth(over_time=RULE)
        return Module(), callback, ModelCheckpoint(folder, save_last=True)

    module, callback, saved = parts()
    options: dict[str, Any] = {"max_epochs": epochs, "enable_checkpointing": True, **more}
    trainer(folder, callback, saved, Stop(stop), **options).fit(module, data())
    if stop is None:
        return weights(module)
    module, callback, saved = parts()
    torch.manual_seed(99)  # another process has another state
    if not restore:
        callback.load_state_dict = lambda state: None  # type: ignore[method-assign]
    trainer(folder, callback, saved, **options).fit(
        module, data(), ckpt_path=str(folder / "last.ckpt"), weights_only=False
    )
    return weights(module)


def test_a_run_that_is_resumed_at_the_end_of_an_epoch_takes_the_same_steps(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "a", 4, None)
    assert all(map(torch.equal, whole, fitted(tmp_path / "b", 4, 2)))
    # the twin: without the state of the callback it takes others
    assert not all(map(torch.equal, whole, fitted(tmp_path / "c", 4, 2, restore=False)))


def resumed_on_a_rank(rank: int, port: int, folder: Path) -> None:
    """As torchrun starts a process: compare a run with one that is stopped and resumed."""
    warnings.simplefilter("ignore")
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    torch.set_num_threads(1)
    more = {"devices": 2, "strategy": "ddp"}
    whole = fitted(folder / "a", 3, None, **more)
    assert all(map(torch.equal, whole, fitted(folder / "b", 3, 1, **more)))
    assert not all(map(torch.equal, whole, fitted(folder / "c", 3, 1, restore=False, **more)))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_run_on_two_processes_resumes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(resumed_on_a_rank, (port, tmp_path), nprocs=2)


def test_a_checkpoint_from_the_middle_of_an_epoch_gives_a_warning(tmp_path: Path) -> None:
    module, callback = Module(), StochasticDepth(0.5)
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer(tmp_path, callback, saved, max_epochs=1, enable_checkpointing=True).fit(module, data())
    loop = trainer(tmp_path, StochasticDepth(0.5), max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.fit(Module(), data(), ckpt_path=str(tmp_path / "step=3.ckpt"), weights_only=False)
    messages = [str(warning.message) for warning in caught]
    assert sum("middle of an epoch, after 3 of 4 batches" in m for m in messages) == 1


def test_validation_and_testing_attach_nothing(tmp_path: Path) -> None:
    class Tested(Module):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.model(batch[0])

    module = Tested()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, StochasticDepth(0.5)).test(module, data(), verbose=False)
    assert not torchdrop.has_stochastic_depth(module)
