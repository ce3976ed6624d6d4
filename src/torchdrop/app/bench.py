"""Measure what stochastic depth saves on this machine: dense, masked and skipping, side by side.

The schema of the file, version 1::

    schema       1
    config       the settings
    versions     of Python, torchdrop, torch and other packages that the figures depend on
    machine      the machine that the figures were taken on; ``load`` before and after the
                 measurement, null where the system has no load average
    branches     how many were found and are skipped, and the mean of their rates
    contestants  {dense, masked, skipping: {ms, time_over_dense, flops, flops_over_dense,
                 saved_bytes, bytes_over_dense, peak_bytes, observed_p}}
    finding      the result in one or two sentences

``ms`` has n, mean, median and quartiles of a training step (forward, cross entropy, backward).
``time_over_dense`` is a ratio of medians; in batch mode of means, since the cost of a step varies
there. ``flops``, ``saved_bytes`` and ``observed_p`` (the drop rate that was delivered, mean over
branches) are means over steps without torch.compile: in batch mode over all timed steps, else over
four. ``peak_bytes`` is the peak of the memory that a step allocates, above what was allocated
before it; null where the device keeps no record.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import torchdrop
from torchdrop.checks import MODES, check_choice, check_whole
from torchdrop.cost import FlopCounter, SavedBytes
from torchdrop.schedules import DEPTH_RULES, check_rate

from .errors import UserError, one_line, value_errors_for_user
from .loss import loss_of
from .models import open_model
from .results import locked, machine, versions, write_whole
from .timing import in_turn, peak_bytes, threads

__all__ = ["Settings", "bench"]

CONTESTANTS = {"dense": "auto", "masked": "mask", "skipping": "auto"}
"""The variants that are timed, with the ``compute`` of each. In dense, nothing is dropped."""

WARM_UP = 3
"""The number of untimed rounds at the start; fewer if fewer steps than that are timed."""
ROW_STEPS, BATCH_STEPS = 21, 60
"""The default number of timed steps. The cost of a step varies more in batch mode."""
COUNTED = 4
"""Steps that FLOPs and bytes are averaged over in row mode, where they hardly vary."""

MEASURED = 4
"""Steps whose peak memory is measured."""

SMALL, USUAL = 32, 224
"""The default height and width of images: for the networks of this package, for all others."""

NOISE = 0.02
"""Ratios that differ from 1 by less than this count as equal to 1."""


@dataclass(frozen=True)
class Settings:
    """The options of ``torchdrop bench``. None: the default of the model, mode or machine."""

    model: str
    out: Path
    p: float = 0.2
    schedule: str = "linear"
    mode: str = "row"
    batch: int = 32
    size: int | None = None
    channels_last: bool = False
    compile: bool = False
    steps: int | None = None
    device: str | None = None
    threads: int | None = None


Tell = Callable[[str, int, int], None]
"""Called with the present stage, the number of rounds done and the number of all rounds."""


def bench(settings: Settings, tell: Tell | None = None) -> dict[str, Any]:
    """Measure, write the file, and return its content with the path of the file as ``path``.

    Args:
        settings: The options.
        tell: Called at the start of each stage, and after each round.

    Raises:
        UserError: A setting is wrong, or a step fails; nothing is written. The message is one line
            on what to do.
    """
    _check(settings)
    device = _device(settings.device)
    steps = settings.steps or (BATCH_STEPS if settings.mode == "batch" else ROW_STEPS)
    tell = tell or (lambda doing, done, total: None)
    rounds = min(WARM_UP, steps) + steps
    with threads(settings.threads):
        tell(f"making {settings.model}{_busy(device)}", 0, rounds)
        subjects = _subjects(settings, device)
        for name, subject in subjects.items():
            tell(f"first step, {name}", 0, rounds)
            _try(settings, name, subject)
        with locked(settings.out):
            load = _load()
            contestants = _measure(settings, subjects, steps, tell)
            side = subjects["dense"].images.shape[-1]
            content = {
                "schema": 1,
                "config": {
                    **asdict(settings),
                    "out": str(settings.out),
                    "size": side,
                    "steps": steps,
                    "device": str(device),
                },
                "versions": versions("timm"),
                "machine": {**machine(), "load": {"before": load, "after": _load()}},
                "branches": _branches(subjects["skipping"].model),
                "contestants": contestants,
            }
            content["finding"] = _finding(content)
            path = settings.out / f"{_file_name(settings, side)}.json"
            write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return {**content, "path": str(path)}


def _check(settings: Settings) -> None:
    with value_errors_for_user():
        for name in ("batch", "size", "steps", "threads"):
            value = getattr(settings, name)
            if value is not None:
                check_whole(value, f"--{name}", 1)
        check_rate(settings.p, "--p")
        check_choice(settings.mode, MODES, "--mode")
        check_choice(settings.schedule, tuple(DEPTH_RULES), "--schedule")


def _device(name: str | None) -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"--device {name!r} is not a device that torch knows; give cpu, cuda or mps"
        ) from error
    if device.type != "cpu":
        here = ["cpu", *([found.type] if found else [])]
        if device.type not in here:
            raise UserError(
                f"--device {name}: this machine has none; choose one of {', '.join(here)}"
            )
        number = torch.accelerator.device_count()
        if device.index is not None and device.index >= number:
            raise UserError(
                f"--device {name}: the devices of this machine are numbered 0 to {number - 1}"
            )
    return device


# The networks


def _network(name: str, size: int | None) -> tuple[nn.Module, int]:
    """Return the network of that name, and the height and width of its images."""
    if ":" in name or name == "fractalnet" or re.fullmatch(r"resnet-\d+", name):
        model = open_model(name)
        small = not name.startswith("torchvision:")
        side = size or (SMALL if small else USUAL)
        return model.build(10 if small else 1000, model.channels or 3), side
    known = torchvision.models.list_models(module=torchvision.models)
    if name in known:
        return open_model(f"torchvision:{name}").build(1000, 3), size or USUAL
    if find_spec("timm") is None:
        raise UserError(
            f"torchvision has no classifier {name!r}{_alike(name, known)}; "
            f"for those of timm: pip install 'torchdrop[timm]'"
        )
    import timm

    if not timm.is_model(name):
        near = _alike(name, [*known, *timm.list_models()])
        raise UserError(
            f"neither torchvision nor timm has a model {name!r}{near}; a CIFAR ResNet is given as "
            f"resnet-N, your own model as package.module:factory"
        )
    about = timm.get_pretrained_cfg(name)
    side = size or (about.input_size[-1] if about else USUAL)
    fixed = about is not None and about.fixed_input_size
    options: dict[str, Any] = {"img_size": side} if fixed and size else {}
    return timm.create_model(name, **options), side


def _alike(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, sorted(set(known)), 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


@dataclass
class _Subject:
    """One of the contestants: a network with its batch."""

    model: nn.Module
    run: Any
    images: Tensor
    labels: Tensor

    def forward(self) -> Tensor:
        """Return the loss, without torch.compile."""
        return loss_of(self.model, self.images, self.labels)

    def steps(self, begin: int = 0) -> Callable[[], None]:
        """Return a function that takes a training step; step n draws from seed n."""
        numbers = count(begin)

        def step() -> None:
            torch.manual_seed(next(numbers))
            self.model.zero_grad(set_to_none=True)
            loss_of(self.run, self.images, self.labels).backward()  # type: ignore[no-untyped-call]

        return step


def _subjects(settings: Settings, device: torch.device) -> dict[str, _Subject]:
    """Return the contestants: copies of one network with the same weights, on the same batch."""
    torch.manual_seed(0)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    try:
        network, side = _network(settings.model, settings.size)
        network = network.to(memory_format=layout)
        images = torch.randn(max(settings.batch, 2), 3, side, side)
        with torch.no_grad():
            logits = network.eval()(images[:2])
    except UserError:
        raise
    except Exception as error:  # whatever the network raises is the user's to see
        given = f"{settings.size} px" if settings.size else "its own size"
        raise UserError(
            f"{settings.model} does not run on images of {given}: {one_line(error)}; "
            f"try another --size"
        ) from error
    classes = logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() == 2 else 2
    labels = torch.randint(classes, (settings.batch,)).to(device)
    batch = images[: settings.batch].to(device).contiguous(memory_format=layout)
    subjects = {}
    for name, compute in CONTESTANTS.items():
        model = copy.deepcopy(network)
        try:
            torchdrop.add_stochastic_depth(
                model,
                # At p=0, masks that the network has of its own are inactive as well.
                0.0 if name == "dense" else settings.p,
                schedule=settings.schedule,
                mode=settings.mode,
                compute=compute,
                example_inputs=images[:2],
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{settings.model}: {one_line(error)}") from error
        model = model.to(device).train()
        run = torch.compile(model) if settings.compile else model
        subjects[name] = _Subject(model, run, batch, labels)
    return subjects


def _try(settings: Settings, name: str, subject: _Subject) -> None:
    """Take the first step of a contestant, which compiles it under ``--compile``."""
    try:
        subject.steps()()
    except UserError:
        raise
    except Exception as error:  # whatever the network raises is the user's to see
        shape = " x ".join(map(str, subject.images.shape))
        raise UserError(
            f"a training step of {settings.model}, {name}, fails on a batch of {shape}: "
            f"{one_line(error)}; try another --size or --batch"
            + (", or leave out --compile" if settings.compile else "")
        ) from error


# The measurement


def _measure(
    settings: Settings,
    subjects: dict[str, _Subject],
    steps: int,
    tell: Tell,
) -> dict[str, dict[str, Any]]:
    device = subjects["dense"].images.device
    # Steps 0, 1, ... are timed (and counted, in batch mode); the steps after them warm up.
    warm_up = in_turn({name: s.steps(steps) for name, s in subjects.items()}, device)
    timed = in_turn({name: s.steps() for name, s in subjects.items()}, device)
    taken: list[dict[str, float]] = []
    rounds = min(WARM_UP, steps) + steps
    doing = f"timing a step of each, {steps} times after {rounds - steps} to warm up"
    tell(doing, 0, rounds)
    for turn in range(rounds):
        if turn < rounds - steps:
            next(warm_up)
        else:
            taken.append(next(timed))
        tell(doing, turn + 1, rounds)
    batch_mode = settings.mode == "batch"
    found: dict[str, dict[str, Any]] = {}
    for name, subject in subjects.items():
        tell(f"counting FLOPs and bytes, {name}", rounds, rounds)
        ms = [one[name] for one in taken]
        low, _, high = quantiles(ms, n=4) if steps > 1 else ms * 3
        plan = torchdrop.get_plan(subject.model)
        plan.observed()
        flops, kept = _count(subject, steps if batch_mode else min(COUNTED, steps))
        rates = list(plan.observed().values())
        run = subject.steps()
        peaks = [peak_bytes(run, device) for _ in range(min(MEASURED, steps))]
        found[name] = {
            "ms": {"n": steps, "mean": fmean(ms), "median": median(ms), "low": low, "high": high},
            "flops": flops,
            "saved_bytes": kept,
            "peak_bytes": max((peak for peak in peaks if peak is not None), default=None),
            "observed_p": fmean(rates) if rates else None,
        }
    dense = found["dense"]
    typical = "mean" if batch_mode else "median"
    for figures in found.values():
        figures["time_over_dense"] = figures["ms"][typical] / dense["ms"][typical]
        figures["flops_over_dense"] = _ratio(figures["flops"], dense["flops"])
        figures["bytes_over_dense"] = _ratio(figures["saved_bytes"], dense["saved_bytes"])
    return found


def _ratio(value: float, dense: float) -> float | None:
    return value / dense if dense else None


def _count(subject: _Subject, steps: int) -> tuple[float, float]:
    """Return the FLOPs of a step and the bytes that it keeps for backward, as means over steps."""
    flops, kept = [], []
    for number in range(steps):
        torch.manual_seed(number)
        subject.model.zero_grad(set_to_none=True)
        with FlopCounter() as counter:
            with SavedBytes() as saved:
                loss = subject.forward()
            loss.backward()  # type: ignore[no-untyped-call]
        flops.append(counter.total)
        kept.append(saved.total)
    return fmean(flops), fmean(kept)


def _branches(model: nn.Module) -> dict[str, Any]:
    branches = [branch for block in torchdrop.get_plan(model).blocks for branch in block.branches]
    return {
        "found": len(branches),
        "skipped": sum(branch.action == "skip" for branch in branches),
        "mean_p": fmean(branch.p for branch in branches),
    }


def _load() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _busy(device: torch.device) -> str:
    """Return a remark if other programs occupy the cores, so that threads wait for each other."""
    load, cores = _load(), os.cpu_count() or 1
    if device.type != "cpu" or torch.get_num_threads() == 1 or not load or load[0] <= cores:
        return ""
    return f" (load {load[0]:.1f} on {cores} cores: --threads 1 is faster on a busy machine)"


def _file_name(settings: Settings, side: int) -> str:
    """Return the name of the file: one for each configuration, overwritten by a new measurement."""
    words = [
        settings.model,
        settings.mode,
        f"p{settings.p:g}",
        settings.schedule,
        f"{settings.batch}x{side}",
        *(["channels-last"] if settings.channels_last else []),
        *(["compile"] if settings.compile else []),
    ]
    return re.sub(r"[^\w.-]+", "-", "-".join(words))


def _finding(content: dict[str, Any]) -> str:
    """Return the result in one or two sentences."""
    skipping, masked = content["contestants"]["skipping"], content["contestants"]["masked"]
    branches = content["branches"]
    time, flops = skipping["time_over_dense"], skipping["flops_over_dense"] or 1.0
    found = (
        f"Skipping takes {time:.2f} of the time of dense steps for {flops:.2f} of their FLOPs; "
        f"masking takes {masked['time_over_dense']:.2f}."
    )
    if branches["skipped"] < branches["found"]:
        found += (
            f" Of {branches['found']} branches, {branches['skipped']} are skipped and the others "
            f"masked; print(plan) says why."
        )
    if time > 1 - NOISE and flops < 1 - NOISE:
        found += (
            " Skipping does not pay here: the work that it saves takes less time than taking and "
            "adding rows. Try a larger --batch"
            + (", or --mode batch." if content["config"]["mode"] == "row" else ".")
        )
    ms = content["contestants"]["dense"]["ms"]
    if ms["high"] - ms["low"] > 0.1 * ms["median"]:
        found += " The times vary a lot, so that they are not reliable: is the machine busy?"
    return found
