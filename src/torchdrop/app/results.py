"""The file results.json: its schema, and how it is written so that nothing is lost.

The schema, version 1::

    schema    1
    status    "partial" while runs are missing, else "complete"
    config    the settings; results with equal ``config`` are comparable. A resumed comparison may
              add ``seeds`` and ``methods``; everything else has to stay the same
    versions  of Python, torchdrop, torch and other packages that the figures depend on
    machine   the machine that the figures were taken on
    costs     {seed: {name: {step_ms, flops, saved_bytes}}}, measured before anything is trained
    methods   {name: {summary, p, asked_p, variance_shift, seeds: [...], mean: {...}, std: {...},
              ratio: {...}}}

A finished run is an entry of ``seeds``:

- ``seed``.
- ``test_error`` and ``train_error``, as fractions, both in eval mode after training.
- ``test_nll``, the mean negative log-likelihood in nats.
- ``step_ms``, the time of a training step, timed side by side with the other methods.
- ``flops`` and ``saved_bytes``, means over training steps.
- ``observed_p``, the drop rate that training delivered, mean over branches.
- ``epoch``, the epoch that is reported; ``seconds`` of training; ``curves``.

``mean`` and ``std`` (of a sample, n - 1) are over seeds. ``ratio`` holds the means of ``step_ms``,
``flops`` and ``saved_bytes`` divided by those of ``none``. ``p`` is the argument of the method,
``asked_p`` the mean drop rate that results from it. ``variance_shift`` is the ratio of the variance
at a BatchNorm in training to that in evaluation, for the trained network of seed 0 and at the
BatchNorm where it is furthest from 1; it is missing where seed 0 was trained by an older version,
which did not measure it. A figure that does not exist, or is not finite, is null.
"""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from filelock import FileLock, Timeout

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
"""The figures of a run that are averaged over seeds."""

_RATIOS = ("step_ms", "flops", "saved_bytes")

_GROWING = ("seeds", "methods", "costs_like")
"""The parts of the configuration that may be extended: no finished run depends on them."""

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
"""The parts of the content that a resumed comparison, the table and the report rely on."""


class Results:
    """The content of results.json in a folder, written after every change.

    Args:
        folder: The directory of the comparison.
        config: The settings of the comparison.
        resume: Whether to continue with the results in the folder.

    Raises:
        UserError: The folder holds results although ``resume`` is false, or none although it is
            true; or they are of another configuration, or damaged.
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
        """Return the entry of a method, made if it is new, with the fields ``about`` set."""
        entry: dict[str, Any] = self.content["methods"].setdefault(name, {"seeds": []})
        entry.update(about)
        return entry

    def add(self, name: str, seed: int, **figures: Any) -> None:
        """Add a finished run."""
        seeds: list[dict[str, Any]] = self.begin(name)["seeds"]
        seeds.append({"seed": seed, **figures})
        seeds.sort(key=lambda entry: int(entry["seed"]))

    def set_costs(self, seed: int, costs: dict[str, dict[str, float]]) -> None:
        """Set the costs of each method at a seed, in the finished runs of that seed too."""
        self.content["costs"][str(seed)] = costs
        for name, cost in costs.items():
            for entry in self.begin(name)["seeds"]:
                if entry["seed"] == seed:
                    entry.update(cost)

    def finished(self, name: str, seed: int) -> bool:
        """Whether the run of a method at a seed is finished."""
        return any(entry["seed"] == seed for entry in self.begin(name)["seeds"])

    def save(self, complete: bool = False) -> None:
        """Compute the means and write the file, as a whole or not at all.

        Args:
            complete: Whether all runs are finished.

        Raises:
            UserError: The file cannot be written.
        """
        self.content = _finite(self.content)
        self.content["status"] = "complete" if complete else "partial"
        methods = self.content["methods"]
        # In the order of the configuration, also where a resumed comparison added a method.
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
    """Check that the folder holds results to continue with.

    Raises:
        UserError: It holds none.
    """
    if not (folder / FILE).exists():
        raise UserError(
            f"there are no results in {str(folder)!r} to go on with; leave --resume out to begin "
            f"there, or give the --out of the comparison that was stopped"
        )


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: whenever it is read, it holds the old text or the new one.

    Raises:
        UserError: The file cannot be written.
    """
    # The folder has one writer, so that a file left by a process that was killed is overwritten.
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
    """Lock a folder, created if it is missing, so that no other process works in it.

    The system releases the lock when the process ends, even if it is killed. The lock's file stays
    in the folder.

    Raises:
        UserError: Another process holds the lock, or the folder cannot be written to or locked.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(
            f"cannot write in {str(folder)!r} ({error.strerror}); choose another --out"
        ) from error
    lock = FileLock(path, blocking=False)
    try:
        with warnings.catch_warnings():
            # On a file system without locks, filelock warns and relies on the existence of a file,
            # which would outlive a process that is killed. As an error, the warning prevents it.
            warnings.simplefilter("error", UserWarning)
            lock.acquire()
    except Timeout as error:
        raise UserError(
            f"another torchdrop is at work in {str(folder)!r}; wait for it or choose another --out"
        ) from error
    except (OSError, NotImplementedError, UserWarning) as error:
        raise UserError(
            f"cannot lock {str(folder)!r} ({one_line(error)}), so another torchdrop could write "
            f"there too; choose an --out on a local disk"
        ) from error
    try:
        yield
    finally:
        lock.release()


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
            f"the file is left as it is, give another --out"
        ) from error
    return content


def _check_shape(value: Any, shape: Any, where: str = "it") -> None:
    """Check that a value has the types and the fields of ``shape``.

    Raises:
        TypeError: A value has another type.
        ValueError: A field is missing.
    """
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
    """Return the configuration ``there``, with the seeds and methods that ``wanted`` adds to it."""
    grown = dict(there)
    for name in _GROWING:
        old, new = there.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            grown[name] = {**old, **{key: new[key] for key in new if key not in old}}
        elif isinstance(old, int) and isinstance(new, int):
            grown[name] = max(old, new)
    return grown


def _first_difference(there: Any, wanted: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Return the first field in which two configurations differ, and its two values."""
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
    # A mean over the other seeds alone would hide that a run has no figure, as if it diverged.
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
    """Return the versions of Python, torchdrop, the packages it uses, and ``more`` packages."""
    found = {"python": platform.python_version(), "torchdrop": torchdrop.__version__}
    for package in ("torch", "torchvision", "lightning", "numpy", "scikit-learn", *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Return a description of this machine."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    with suppress(OSError):  # the file exists on Linux only
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
