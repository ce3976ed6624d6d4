"""One training run of a network, a method and a seed, by Lightning's Trainer and a callback."""

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
"""The time between two updates of the progress bar."""
_LOGGERS = ("lightning.pytorch", "lightning.fabric")
CURVE_POINTS = 10
"""Roughly how often the test error is measured during a run, for the curves only."""


@dataclass(frozen=True)
class Scores:
    """The scores of a network on images: error as a fraction, mean negative log-likelihood."""

    error: float
    nll: float


@dataclass
class History:
    """The figures of a run, epoch by epoch, as plain lists for checkpoints and JSON.

    ``test_epoch`` (the number of epochs done) and ``test_error`` are the points of a curve.
    ``observed`` holds the drop rate that each epoch delivered; it is empty for methods that drop
    nothing.
    """

    train_loss: list[float] = field(default_factory=list)
    observed: list[float] = field(default_factory=list)
    val_error: list[float] = field(default_factory=list)
    test_epoch: list[int] = field(default_factory=list)
    test_error: list[float] = field(default_factory=list)
    best_epoch: int = 0


@dataclass(frozen=True)
class Run:
    """The arguments of one training run.

    Attributes:
        label: The text of the progress bar.
        model: The network, with the method applied.
        channels: The number of input channels of the network.
        applied: The method at work on the network.
        data: The images.
        recipe: The training hyperparameters.
        seed: The seed of the order of the data and of the method's draws.
        folder: The directory of checkpoints, and of the outcome that the training process writes.
        devices: The number of devices.
        accelerator: The kind of device, as Lightning names it.
        precision: The precision, as Lightning names it.
        done: The epochs of the runs before this one, for the time left.
        total: The epochs of all runs.
        checkpoint_seconds: The time between two checkpoints.
        show: Whether to show the progress bar.
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
        """The checkpoint that an interrupted run continues from."""
        return self.folder / "last.ckpt"

    @property
    def outcome(self) -> Path:
        """The file with the history and the selected weights, written by the training process."""
        return self.folder / "outcome.pt"


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum, no dampening, and weight decay on every parameter."""
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
    """Return the scores in eval mode; afterwards every module has its former mode again."""
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
    """The training step, which is the same for every method."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.model = run.model
        self.applied = run.applied
        self.recipe = run.recipe
        self.run = run

    def train_dataloader(self) -> Batches:
        """Return the batches of this rank."""
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
        """Return the loss of a batch, after the method has changed the batch."""
        images, labels = self.applied.batch(*batch)
        return loss_of(self.model, images, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; its learning rate is set at the start of each epoch."""
        return make_optimizer(self.model, self.recipe)


class Observer(lightning.Callback):
    """Set learning rates, record the history, show progress and write checkpoints.

    The global generator is seeded at the start of each epoch, from the seed of the run and the
    number of the epoch. A run that continues from a checkpoint therefore draws the same numbers as
    a run that was not interrupted.
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
        """The key of this callback's state in Lightning's checkpoint."""
        return "torchdrop"

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the best weights, for Lightning's checkpoint."""
        return {"history": dict(vars(self.history)), "best_weights": self.best_weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the history and the best weights from Lightning's checkpoint."""
        self.history = History(**state["history"])
        self.best_weights = state["best_weights"]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Silence Lightning in a spawned worker, which does not inherit filters and log levels."""
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
        """Remove the progress bar before an error is printed."""
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
        """Record the loss; show it now and then only, since reading it waits for the device."""
        self._losses.append(outputs["loss"].detach())
        if self._progress is not None and time.monotonic() - self._shown_at > SHOW_SECONDS:
            share = (index + 1) / trainer.num_training_batches
            self._show(trainer.current_epoch + share, float(self._losses[-1]))

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, task: lightning.LightningModule
    ) -> None:
        """Record the epoch, evaluate the network and save a checkpoint, where these are due."""
        run, history = self.run, self.history
        # Every rank has its own part of the batches, so that the mean over ranks is recorded.
        loss = _over_ranks(trainer, float(torch.stack(self._losses).mean()))
        observed = run.applied.observed()
        if observed is not None:
            history.observed.append(_over_ranks(trainer, observed))
        history.train_loss.append(loss)
        done = trainer.current_epoch + 1
        if trainer.is_global_zero:
            self._evaluate(done)
        self._show(done, loss)
        # Clocks differ between ranks, and all have to save at the same epoch.
        due = time.monotonic() - self._saved_at >= run.checkpoint_seconds
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self._saved_at = time.monotonic()
            new = run.checkpoint.with_suffix(".new")
            trainer.save_checkpoint(new)
            if trainer.is_global_zero:
                os.replace(new, run.checkpoint)  # in one step: a kill leaves the old or the new one

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
        """Write the outcome to a file, since with several devices this is a process of its own."""
        self._stop()
        if trainer.is_global_zero:
            weights = self.best_weights or _weights(self.run.model)
            new = self.run.outcome.with_suffix(".new")
            torch.save({"history": dict(vars(self.history)), "weights": weights}, new)
            os.replace(new, self.run.outcome)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a network's state, on the CPU."""
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}


def _over_ranks(trainer: lightning.Trainer, value: float) -> float:
    """Return the mean of a value over ranks."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(tensor, reduce_op="mean"))


def _ignore_known_warnings() -> None:
    """Ignore warnings that the user of the command line cannot act on."""
    # The batches come from memory, so that loader workers would not help.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # An epoch of few steps is shorter than Lightning's interval of logging; nothing is logged.
    warnings.filterwarnings("ignore", message="The number of training batches")
    # The user chose --accelerator cpu on a machine with a GPU.
    warnings.filterwarnings("ignore", message="GPU available but not used")
    # Raised inside Lightning 2.6 on torch 2.14.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and log messages of Lightning that do not concern the user."""
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
        # Spawned workers; relaunching the script would start the whole comparison in each.
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
    """Check that Lightning can train with these arguments.

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
        run: The arguments of the run.
        resume: Whether to continue from the files in the folder of the run: its outcome if it was
            trained to the end, else its last checkpoint.

    Returns:
        The history. The network then holds the weights of the selected epoch. The outcome stays in
        the folder; the caller removes it once the figures are saved.

    Raises:
        UserError: The folder cannot be written to, or its files cannot be read.
        KeyboardInterrupt: The user stopped it. The last checkpoint stays in the folder.
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
            # Loaded here as well, since Lightning's errors do not name the file.
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
            # Lightning turns Ctrl-C into an exit, and ignores SIGINT from then on.
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
    """Load a file of a run, which may hold tensors and plain values, but no code.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> UserError:
    reason = one_line(error).partition(". ")[0]
    return UserError(
        f"cannot go on from {str(path)!r} ({reason}); remove it and this run is trained "
        f"again, finished runs are kept"
    )


def mean_observed(history: History) -> float | None:
    """Return the drop rate that a run delivered: the mean over its epochs, all equally long."""
    return fmean(history.observed) if history.observed else None
