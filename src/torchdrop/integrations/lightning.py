"""Stochastic depth as a callback of Lightning. Needs the extra ``train``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed as dist

from torchdrop.attaching.apply_schedule import apply_schedule
from torchdrop.attaching.attach import add_stochastic_depth, has_stochastic_depth
from torchdrop.attaching.measure_shares import share_skipped
from torchdrop.attaching.plan import Plan, get_plan
from torchdrop.rows.collectives import in_process_group

__all__ = ["StochasticDepth"]


class StochasticDepth(Callback):
    """Add stochastic depth to a LightningModule, and let its rate follow a rule over training.

    It is added in ``setup``, before the strategy wraps the model (DDP, FSDP). With ``over_time``
    the rate is set before each batch; batches whose gradients are accumulated share one rate. At
    the end of each epoch of training it logs

    * ``stochastic_depth/p``: the mean rate of the branches;
    * ``stochastic_depth/observed``, ``.../observed_low``, ``.../observed_high``: the observed rate
      over all branches in this process, with its 95 % interval;
    * ``stochastic_depth/flops_skipped``: the share of the FLOPs of a forward pass that the observed
      rates skip, if ``example_inputs`` was given.

    Checkpoints hold the rates and the state of torch's generator on the CPU, of each rank. A run
    that is stopped at the end of an epoch and resumed from its checkpoint takes the same steps as
    one that was not. In the middle of an epoch that needs a loader that can be resumed: with a
    plain DataLoader, Lightning goes on with other batches, and the callback warns.

    Args:
        p: As for :func:`add_stochastic_depth`. With ``over_time``, the rate before the first step.
        over_time: A function of the progress of training, in [0, 1], that returns a rate, such as
            one of :mod:`torchdrop.schedules.over_time`. None: the rate stays as it is.
        log: Whether to log.
        **arguments: Further arguments of :func:`add_stochastic_depth`.

    Raises:
        TypeError: ``over_time`` is not a function.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from torchdrop.integrations.lightning import StochasticDepth
        >>> from torchdrop.schedules.over_time import ramp
        >>> callback = StochasticDepth(over_time=ramp(0.0, 0.2))
        >>> trainer = Trainer(max_epochs=10, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        p: Any = 0.2,
        *,
        over_time: Callable[[float], float] | None = None,
        log: bool = True,
        **arguments: Any,
    ) -> None:
        if over_time is not None and not callable(over_time):
            raise TypeError(
                f"over_time has to be a function of progress or None, but got {over_time!r}"
            )
        self.p, self.over_time, self.log_rates, self.arguments = p, over_time, log, arguments
        self.plan: Plan | None = None
        self._resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add stochastic depth, unless the module has it from an earlier call of ``fit``."""
        if stage != "fit":
            return
        if not has_stochastic_depth(pl_module):
            add_stochastic_depth(pl_module, self.p, **self.arguments)
        self.plan = get_plan(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a rule over time for a run without an end, before the first step."""
        if self.over_time is not None:
            _progress(trainer, 0)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if self._resumed and 0 < done < trainer.num_training_batches:
            loader: Any = trainer.train_dataloader
            if not hasattr(loader, "state_dict"):
                warnings.warn(
                    f"the checkpoint is from the middle of an epoch, after {done} of "
                    f"{trainer.num_training_batches:g} batches, but the training loader has no "
                    f"state_dict(): the run goes on with other batches, and drops other rows, than "
                    f"one that was not stopped; save checkpoints at the end of an epoch, or use a "
                    f"loader that can be resumed",
                    stacklevel=2,
                )
        self._resumed = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the rate of this step."""
        if self.over_time is not None and self.plan is not None:
            apply_schedule(self.plan, self.over_time, _progress(trainer, batch_idx))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the rates of this epoch."""
        if self.plan is None:
            return
        found = self.plan.observed_rates(reset=True)
        if not (self.log_rates and found.total.rows):
            return
        branches = [branch for block in self.plan.blocks for branch in block.branches]
        values = {
            "p": fmean(branch.p for branch in branches),
            "observed": found.total.rate,
            "observed_low": found.total.low,
            "observed_high": found.total.high,
        }
        if all(branch.share is not None for branch in branches):
            rates = [found.branches[branch.name].rate for branch in branches]
            values["flops_skipped"] = share_skipped(branches, rates)
        pl_module.log_dict({f"stochastic_depth/{name}": value for name, value in values.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the rates, and the state of the generator of each rank."""
        if self.plan is None:
            return {}
        states: list[Any] = [torch.get_rng_state()]
        if in_process_group():
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, torch.get_rng_state())
        return {"plan": self.plan.state_dict(), "generators": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Lightning calls it before the loader starts."""
        if not state_dict or self.plan is None:
            return
        self.plan.load_state_dict(state_dict["plan"])
        states, rank = state_dict["generators"], 0
        if in_process_group():
            rank = dist.get_rank()
        if rank < len(states):  # a run may be resumed on more processes
            torch.set_rng_state(states[rank])
        self._resumed = True


def _progress(trainer: Trainer, batch_idx: int) -> float:
    """Return how much of the training is done, in [0, 1].

    Steps are counted by batches, so that several optimizers do not count several times.

    Raises:
        ValueError: The training has no known end.
    """
    done = []
    if trainer.max_steps > 0:
        done.append(trainer.global_step / trainer.max_steps)  # both count steps of optimizers
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is not None and epochs > 0 and math.isfinite(batches):
        accumulated = max(trainer.accumulate_grad_batches, 1)
        steps = -(-int(batches) // accumulated)  # the last step of an epoch may have fewer batches
        done.append((trainer.current_epoch * steps + batch_idx // accumulated) / (epochs * steps))
    if not done:
        raise ValueError(
            "a rule over time needs to know when training ends, but the trainer has neither "
            "max_steps, nor max_epochs with a loader of known length; give the trainer max_steps"
        )
    return min(max(done), 1.0)
