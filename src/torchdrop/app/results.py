"""results.json: what is in it, and how it is kept safe.

The schema, version 1::

    schema    1
    status    "partial" while runs are missing, else "complete"
    config    what was asked for: two directories with equal ``config`` are comparable. Going on may
              add to its ``seeds`` and ``methods``; all else stays
    versions  of torchdrop, torch and what else the figures depend on
    machine   where they were taken
    costs     {seed: {name: {step_ms, flops, saved_bytes}}}, measured before anything is trained
    methods   {name: {summary, p, asked_p, variance_shift, seeds: [...], mean: {...}, std: {...},
              ratio: {...}}}

A finished run is an entry of ``seeds``. It has ``seed``; ``test_error`` and ``train_error`` as
fractions, the latter in eval mode after training; ``test_nll``, the mean negative log-likelihood in
nats; ``step_ms``, a training step timed side by side with the other methods; ``flops`` and
``saved_bytes``, means over training steps; ``observed_p``, the mean drop rate over branches that
training delivered; ``epoch``, the one reported; ``seconds`` of training; and ``curves``. ``mean``
and ``std`` (of a sample, n - 1) are over seeds. ``ratio`` has the means of ``step_ms``, ``flops``
and ``saved_bytes`` over those of ``none``. ``p`` is what the method was given, ``asked_p`` the mean
rate that makes. ``variance_shift`` is the variance at a BatchNorm in training over that in
evaluation, where it is furthest from 1, of the trained network of seed 0; it is missing where an
older version, which did not measure it, trained that one. A figure that does not exist, or is not
finite, is null.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import torchdrop

from .errors import UserError, one_line

__all__ = [
    "FIGURES",
    "FILE",
    "Results",
    "check_resumable",
    "locked",
    "machine",
    "versions",
    "write_whole",
]

SCHEMA = 1
FILE = "results.json"

FIGURES = (
    "test_error",
    "train_error",
    "test_nll",
    "step_ms",
    "flops",
    "saved_bytes",
    "observed_p",
)
"""The figures of a seed that have a mean."""

_RATIOS = ("step_ms", "flops", "saved_bytes")

_GROWING = ("seeds", "methods", "costs_like")
"""The parts of the configuration that may be added to: no figure of another run depends on them."""


_EACH = "*"
_NUMBER = int | float | None
_SHAPE = {
    "config": dict,
    "versions": dict,
    "machine": dict,
    "costs": {_EACH: {_EACH: dict.fromkeys(_RATIOS, _NUMBER)}},
    "methods": {
        _EACH: {
            "summary": str,
            "p": _NUMBER,
            "asked_p": _NUMBER,
            "seeds": [
                {
                    "seed": int,
                    **dict.fromkeys(FIGURES, _NUMBER),
                    "curves": {
                        "train_loss": [_NUMBER],
                        "test_epoch": [int],
                        "test_error": [_NUMBER],
                    },
                }
            ],
        }
    },
}
"""What going on with results, and the table and the report, rely on."""


class Results:
    """The content of results.json in a folder, written after every change.

    Args:
        folder: The directory of the comparison.
        config: What was asked for.
        resume: Whether to go on with results that are there.

    Raises:
        UserError: There are results and ``resume`` is false, or there are none and it is true, or
            they are of another configuration, or damaged.
    """

    def __init__(self, folder: Path, config: dict[str, Any], resume: bool = False) -> None:
        self.path = folder / FILE
        config = json.loads(json.dumps(config))
        if resume:
            check_resumable(folder)
        if not self.path.exists():
            self.content: dict[str, Any] = {
                "schema": SCHEMA,
                "status": "partial",
                "config": config,
                "versions": versions(),
                "machine": machine(),
                "costs": {},
                "methods": {},
            }
            return
        if not resume:
            raise UserError(
                f"{str(folder)!r} holds results already; give --resume to go on with them, "
                f"or another --out"
            )
        self.content = _read(self.path)
        difference = _first_difference(_without_growth(self.content["config"], config), config)
        if difference is not None:
            name, there, wanted = difference
            raise UserError(
                f"{str(folder)!r} holds results of another configuration: {name} is {there} "
                f"there, {wanted} here; resume with the same options, or give another --out"
            )
        self.content["config"] = config

    def begin(self, name: str, **about: Any) -> dict[str, Any]:
        """The entry of a method, made with ``about`` where it is new."""
        entry: dict[str, Any] = self.content["methods"].setdefault(name, {"seeds": []})
        entry.update(about)
        return entry

    def add(self, name: str, seed: int, **figures: Any) -> None:
        """Add a finished run."""
        seeds: list[dict[str, Any]] = self.begin(name)["seeds"]
        seeds.append({"seed": seed, **figures})
        seeds.sort(key=lambda entry: int(entry["seed"]))

    def set_costs(self, seed: int, costs: dict[str, dict[str, float]]) -> None:
        """Set what a step of each method costs at a seed, in the finished runs of it too."""
        self.content["costs"][str(seed)] = costs
        for name, cost in costs.items():
            for entry in self.begin(name)["seeds"]:
                if entry["seed"] == seed:
                    entry.update(cost)

    def finished(self, name: str, seed: int) -> bool:
        """Whether this run is done."""
        return any(entry["seed"] == seed for entry in self.begin(name)["seeds"])

    def save(self, complete: bool = False) -> None:
        """Bring the means up to date and write the file, whole or not at all.

        Raises:
            UserError: There is no space or no right to write.
        """
        self.content = _finite(self.content)
        self.content["status"] = "complete" if complete else "partial"
        methods = self.content["methods"]
        # In the order asked for, wherever a method was added.
        order = dict.fromkeys([*self.content["config"].get("methods", ()), *methods])
        self.content["methods"] = {name: methods[name] for name in order if name in methods}
        for entry in self.content["methods"].values():
            entry["mean"] = {name: _over_seeds(entry, name, fmean) for name in FIGURES}
            entry["std"] = {
                name: _over_seeds(entry, name, lambda v: stdev(v) if len(v) > 1 else None)
                for name in FIGURES
            }
        dense = self.content["methods"].get("none", {}).get("mean", {})
        for entry in self.content["methods"].values():
            entry["ratio"] = {
                name: entry["mean"][name] / dense[name]
                if dense.get(name) and entry["mean"][name] is not None
                else None
                for name in _RATIOS
            }
        text = json.dumps(self.content, indent=1, allow_nan=False) + "\n"
        write_whole(self.path, text)


def check_resumable(folder: Path) -> None:
    """Refuse to go on where nothing was begun.

    Raises:
        UserError: The folder holds no results.
    """
    if not (folder / FILE).exists():
        raise UserError(
            f"there are no results in {str(folder)!r} to go on with; leave --resume out to begin "
            f"there, or give the --out of the comparison that was stopped"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, meets the old one or the new one.

    Raises:
        UserError: There is no space or no right to write.
    """
    # One writer a folder: what a process that was killed left behind is written over.
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {str(path)!r} ({error.strerror}); make room or choose another --out, "
            f"what was written before is still there"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made where it is missing, for this process alone.

    The system releases the lock when the process ends, however it ends.

    Raises:
        UserError: Another process holds it, or it cannot be locked or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"cannot write in {str(folder)!r} ({error.strerror}); choose another --out"
        ) from error
    with file:
        try:
            _lock(file.fileno())
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise UserError(
                    f"another torchdrop is at work in {str(folder)!r}; wait for it or choose "
                    f"another --out"
                ) from error
            raise UserError(
                f"cannot lock {str(folder)!r} ({error.strerror}), so another torchdrop could write "
                f"there too; choose an --out on a local disk"
            ) from error
        yield


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, not {SCHEMA}")
        _check_shape(content, _SHAPE)
        for name, entry in content["methods"].items():
            _check_shape(entry.get("variance_shift"), _NUMBER, f"methods.{name}.variance_shift")
        for costs in content["costs"].values():
            for name in costs:
                content["methods"][name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"cannot go on with {str(path)!r} ({type(error).__name__}: {one_line(error)}); "
            f"it is left as it is, give another --out"
        ) from error
    return content


def _check_shape(value: Any, shape: Any, where: str = "it") -> None:
    """Refuse what cannot be gone on with, or made a table of."""
    kind = dict if isinstance(shape, dict) else list if isinstance(shape, list) else shape
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{where} is a {type(value).__name__}")
    if isinstance(shape, list):
        for inner in value:
            _check_shape(inner, shape[0], where)
    elif isinstance(shape, dict):
        for name in value if set(shape) == {_EACH} else shape:
            inner = f"{where}.{name}" if where != "it" else name
            if name not in value:
                raise ValueError(f"{inner} is missing")
            _check_shape(value[name], shape.get(name, shape.get(_EACH)), inner)


def _without_growth(there: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The configuration ``there`` with the seeds and methods that ``wanted`` has beyond it."""
    grown = dict(there)
    for name in _GROWING:
        old, new = there.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            grown[name] = {**old, **{key: new[key] for key in new if key not in old}}
        elif isinstance(old, int) and isinstance(new, int):
            grown[name] = max(old, new)
    return grown


def _first_difference(there: Any, wanted: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two configurations differ, and its two values."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in [*there, *(key for key in wanted if key not in there)]:
            inner = f"{name}.{key}" if name else str(key)
            found = _first_difference(there.get(key, "nothing"), wanted.get(key, "nothing"), inner)
            if found is not None:
                return found
        return None
    return None if there == wanted else (name, there, wanted)


def _over_seeds(entry: dict[str, Any], name: str, how: Any) -> float | None:
    values = [seed[name] for seed in entry["seeds"]]
    # A mean over some of the seeds only would flatter: a run that has no figure counts.
    if not values or any(value is None for value in values):
        return None
    figure: float | None = how(values)
    return figure


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def versions(*more: str) -> dict[str, str]:
    """Of python, torchdrop and what else figures depend on; of ``more`` packages too."""
    found = {"python": platform.python_version(), "torchdrop": torchdrop.__version__}
    for package in ("torch", "torchvision", "lightning", "numpy", "scikit-learn", *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """What figures were taken on."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    with suppress(OSError):  # only Linux has the file
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
