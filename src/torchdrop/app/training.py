"""One training run: a network, a method, a seed. Lightning's Trainer and a callback of ours."""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerStatus
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .data import Batches, Data, Images
from .errors import UserError, one_line
from .loss import loss_of
from .methods import Applied
from .recipe import Recipe

__all__ = ["History", "Run", "Scores", "check_devices", "evaluate", "make_optimizer", "train"]

EVALUATION_BATCH = 500
SHOW_SECONDS = 0.5
_LOGGERS = ("lightning.pytorch", "lightning.fabric")
CURVE_POINTS = 10
"""About so many times during a run the test error is taken, for the curves only."""


@dataclass(frozen=True)
class Scores:
    """How a network does on a set of images: error as a fraction, mean negative log-likelihood."""

    error: float
    nll: float


@dataclass
class History:
    """What a run leaves behind, epoch by epoch. Plain lists, for checkpoints and for JSON.

    ``test_epoch`` and ``test_error`` are points of a curve; the epoch is the number of epochs
    done. ``observed`` has the delivered drop rate of each epoch, or nothing.
    """

    train_loss: list[float] = field(default_factory=list)
    observed: list[float] = field(default_factory=list)
    val_error: list[float] = field(default_factory=list)
    test_epoch: list[int] = field(default_factory=list)
    test_error: list[float] = field(default_factory=list)
    best_epoch: int = 0


@dataclass(frozen=True)
class Run:
    """Everything that one run needs.

    Attributes:
        label: What the progress bar shows.
        model: The network, with the method applied.
        channels: The input channels of the network.
        applied: The method at work on it.
        data: The images.
        recipe: How to train.
        seed: Decides the order of the data and what is dropped.
        folder: Where checkpoints and what the workers hand back are kept.
        devices: How many.
        accelerator: Lightning's name for the kind of device.
        precision: Lightning's name for it.
        done: Epochs of all runs that are done, for the time left.
        total: Epochs of all runs.
        checkpoint_seconds: How often a checkpoint is written.
        show: Whether to draw the progress bar.
    """

    label: str
    model: nn.Module
    channels: int
    applied: Applied
    data: Data
    recipe: Recipe
    seed: int
    folder: Path
    devices: int = 1
    accelerator: str = "auto"
    precision: str = "32-true"
    done: int = 0
    total: int = 0
    checkpoint_seconds: float = 60.0
    show: bool = True

    @property
    def checkpoint(self) -> Path:
        """The checkpoint to go on from after an interruption."""
        return self.folder / "last.ckpt"

    @property
    def outcome(self) -> Path:
        """The history and the best weights, handed from the process that trained."""
        return self.folder / "outcome.pt"


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with Nesterov momentum, no dampening, and weight decay on every parameter."""
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate(0),
        momentum=recipe.momentum,
        dampening=0.0,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
    )


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, data: Data, channels: int) -> Scores:
    """Error and negative log-likelihood in eval mode; the mode is put back as it was."""
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    wrong, nll = 0, 0.0
    for start in range(0, len(images), EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        x = data.normalised(images.pixels[part], channels).to(device)
        labels = images.labels[part].to(device)
        logits = model(x).float()
        wrong += int((logits.argmax(dim=1) != labels).sum())
        nll += float(F.cross_entropy(logits, labels, reduction="sum"))
    for module, mode in modes:
        module.training = mode
    return Scores(wrong / len(images), nll / len(images))


class Task(lightning.LightningModule):
    """The training step of every method."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.model = run.model
        self.applied = run.applied
        self.recipe = run.recipe
        self.run = run

    def train_dataloader(self) -> Batches:
        """The batches of this rank."""
        return Batches(
            self.run.data,
            batch_size=self.recipe.batch_size,
            seed=self.run.seed,
            channels=self.run.channels,
            augment=self.recipe.augment,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch, as the method changes it."""
        images, labels = self.applied.batch(*batch)
        return loss_of(self.model, images, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer; its learning rate is set at the start of each epoch."""
        return make_optimizer(self.model, self.recipe)


class Observer(lightning.Callback):
    """Sets the learning rate, keeps the history, shows progress, writes checkpoints.

    Each epoch seeds the global generator itself, from the run's seed and its own number. A run
    that goes on from a checkpoint therefore draws what an uninterrupted one would have drawn.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.history = History()
        self.best_weights: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []
        self._progress: Progress | None = None
        self._saved_at = 0.0
        self._shown_at = 0.0

    @property
    def state_key(self) -> str:
        """The name of this callback's state in Lightning's checkpoint."""
        return "torchdrop"

    def state_dict(self) -> dict[str, Any]:
        """The history, for Lightning's checkpoint."""
        return {"history": dict(vars(self.history)), "best_weights": self.best_weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The history back from Lightning's checkpoint."""
        self.history = History(**state["history"])
        self.best_weights = state["best_weights"]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Quieten a spawned worker, which knows nothing of its parent's settings."""
        self.__dict__.update(state)
        _ignore_known_warnings()
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)

    def on_fit_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        """Start the progress bar, on the first rank."""
        self._saved_at = time.monotonic()
        if self.run.show and trainer.is_global_zero:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.percentage:>3.0f} %  left"),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.add_task(
                self.run.label,
                total=self.run.total or self.run.recipe.epochs,
                completed=self.run.done + trainer.current_epoch,
            )
            self._progress.start()

    def _show(self, epochs_done: float, loss: float) -> None:
        if self._progress is not None:
            self._shown_at = time.monotonic()
            epochs = self.run.recipe.epochs
            self._progress.update(
                self._progress.task_ids[0],
                completed=self.run.done + epochs_done,
                description=f"{self.run.label}  epoch {math.ceil(epochs_done)}/{epochs}  "
                f"loss {loss:.3f}",
            )

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_exception(
        self, trainer: lightning.Trainer, task: lightning.LightningModule, error: BaseException
    ) -> None:
        """Take the progress bar away before anything is printed."""
        self._stop()

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, task: lightning.LightningModule
    ) -> None:
        """Seed the epoch and set its learning rate."""
        epoch = trainer.current_epoch
        torch.manual_seed(self.run.seed * 1_000_003 + epoch)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.run.recipe.learning_rate(epoch)
        self._losses = []

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        task: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        index: int,
    ) -> None:
        """Remember the loss; show it now and then, since reading it waits for the device."""
        self._losses.append(outputs["loss"].detach())
        if self._progress is not None and time.monotonic() - self._shown_at > SHOW_SECONDS:
            share = (index + 1) / trainer.num_training_batches
            self._show(trainer.current_epoch + share, float(self._losses[-1]))

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, task: lightning.LightningModule
    ) -> None:
        """Write the history, evaluate where it is due, save a checkpoint."""
        run, history = self.run, self.history
        # Every rank has its own part of the batches: what is recorded is the mean over ranks.
        loss = _over_ranks(trainer, float(torch.stack(self._losses).mean()))
        observed = run.applied.observed()
        if observed is not None:
            history.observed.append(_over_ranks(trainer, observed))
        history.train_loss.append(loss)
        done = trainer.current_epoch + 1
        if trainer.is_global_zero:
            self._evaluate(done)
        self._show(done, loss)
        # Clocks differ: the ranks have to agree before they save together.
        due = time.monotonic() - self._saved_at >= run.checkpoint_seconds
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self._saved_at = time.monotonic()
            new = run.checkpoint.with_suffix(".new")
            trainer.save_checkpoint(new)
            if trainer.is_global_zero:
                os.replace(new, run.checkpoint)  # whole, or the one before

    def _evaluate(self, done: int) -> None:
        run, history = self.run, self.history
        every = max(1, run.recipe.epochs // CURVE_POINTS)
        if run.data.val is not None:
            error = evaluate(run.model, run.data.val, run.data, run.channels).error
            history.val_error.append(error)
            if len(history.val_error) == 1 or error < min(history.val_error[:-1]):
                history.best_epoch = done
                if run.recipe.select == "best_validation":
                    self.best_weights = _weights(run.model)
        if done % every == 0 or done == run.recipe.epochs:
            scores = evaluate(run.model, run.data.test, run.data, run.channels)
            history.test_epoch.append(done)
            history.test_error.append(scores.error)

    def on_fit_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        """Hand the outcome over: with several devices this is another process."""
        self._stop()
        if trainer.is_global_zero:
            weights = self.best_weights or _weights(self.run.model)
            new = self.run.outcome.with_suffix(".new")
            torch.save({"history": dict(vars(self.history)), "weights": weights}, new)
            os.replace(new, self.run.outcome)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's state on the host."""
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}


def _over_ranks(trainer: lightning.Trainer, value: float) -> float:
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(tensor, reduce_op="mean"))


def _ignore_known_warnings() -> None:
    """Say nothing of what the user of the command line can do nothing about."""
    # The batches come from memory: there are no workers to add.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Small data has fewer steps in an epoch than Lightning would log, and nothing is logged.
    warnings.filterwarnings("ignore", message="The number of training batches")
    # --accelerator cpu on a machine with a GPU was the user's choice.
    warnings.filterwarnings("ignore", message="GPU available but not used")
    # Lightning 2.6 on torch 2.14, inside its own loader.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without what does not concern the user of the command line."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        _ignore_known_warnings()
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _trainer(
    devices: int, accelerator: str, precision: str, epochs: int, *callbacks: lightning.Callback
) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        # Spawned workers, since a relaunched script would compare everything once more.
        strategy="ddp_spawn" if devices > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
        max_epochs=epochs,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def check_devices(devices: int, accelerator: str, precision: str) -> None:
    """Ask Lightning whether it can train with these.

    Raises:
        UserError: It cannot.
    """
    with _quiet():
        try:
            _trainer(devices, accelerator, precision, epochs=1)
        except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
            raise UserError(
                f"cannot train with --devices {devices} --accelerator {accelerator} "
                f"--precision {precision}: {one_line(error)}"
            ) from error


def train(run: Run, resume: bool = False) -> History:
    """Train the network of ``run`` in place, to the epoch that its recipe selects.

    Args:
        run: What to train.
        resume: Go on from what the run left in its folder: its outcome, else its checkpoint.

    Returns:
        The run's history. The network holds the weights of the selected epoch. The folder still
        holds the outcome, for as long as nobody has put it elsewhere.

    Raises:
        UserError: The folder cannot be written to, or what it holds cannot be gone on with.
        KeyboardInterrupt: The user stopped it. The last checkpoint remains.
    """
    if not (resume and run.outcome.exists()):
        _fit(run, run.checkpoint if resume and run.checkpoint.exists() else None)
    outcome = _load(run.outcome)
    try:
        run.model.load_state_dict(outcome["weights"])
    except (KeyError, RuntimeError) as error:
        raise _unusable(run.outcome, error) from error
    return History(**outcome["history"])


def _fit(run: Run, checkpoint: Path | None) -> None:
    """Train, and write the outcome."""
    with _quiet():
        trainer = _trainer(
            run.devices, run.accelerator, run.precision, run.recipe.epochs, Observer(run)
        )
        task = Task(run)
        if checkpoint is not None:
            # Lightning's own errors would not name the file.
            try:
                task.load_state_dict(_load(checkpoint)["state_dict"])
            except (KeyError, RuntimeError) as error:
                raise _unusable(checkpoint, error) from error
        before = signal.getsignal(signal.SIGINT)
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.outcome.unlink(missing_ok=True)
            trainer.fit(task, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as error:
            # Lightning turns an interrupt into an exit, and ignores further ones from then on.
            if trainer.state.status == TrainerStatus.INTERRUPTED:
                raise KeyboardInterrupt from error
            raise
        except (OSError, RuntimeError) as error:
            if not isinstance(error, OSError) and "PytorchStreamWriter" not in str(error):
                raise
            raise UserError(
                f"cannot write in {str(run.folder)!r} ({one_line(error)}); make room, then go on "
                f"with --resume"
            ) from error
        finally:
            signal.signal(signal.SIGINT, before)


def _load(path: Path) -> Any:
    """What a file of a run holds: tensors and plain values, no code.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> UserError:
    reason = one_line(error).partition(". ")[0]
    return UserError(
        f"cannot go on from {str(path)!r} ({reason}); remove it and this run is trained "
        f"again, what is finished is kept"
    )


def mean_observed(history: History) -> float | None:
    """The drop rate that a run delivered: the mean over its epochs, which are equally long."""
    return fmean(history.observed) if history.observed else None
