"""The settings of ``torchdrop compare``: the options as given, and with all defaults filled in."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torchdrop.checks import check_whole

from .errors import UserError, value_errors_for_user
from .methods import METHODS, NONE, default_methods, rates
from .models import Model, open_model
from .recipe import AUGMENTATIONS, PRESETS, Preset, Recipe, default_recipe, preset

__all__ = ["ALL", "DEFAULT_METHODS", "Settings", "Setup", "config_of", "set_up"]

DEFAULT_METHODS = default_methods()

ALL = "all"
"""Given as a method: every method that the network has a place for."""

DEFAULT_MODEL = "resnet-20"
DEFAULT_DATA = "digits"
DEFAULT_TRAIN_SIZES = {"digits": 200}
"""So few that a network without regularisation overfits (docs/development/design-notes.md)."""


@dataclass(frozen=True)
class Settings:
    """The options of ``torchdrop compare``. None: as the preset has it, else the default."""

    out: Path
    methods: tuple[str, ...] | None = None
    model: str | None = None
    data: str | None = None
    preset: str | None = None
    p: tuple[str, ...] = ()
    seeds: int = 3
    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    image_size: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    augment: str | None = None
    cost_steps: int = 7
    threads: int | None = None
    devices: int = 1
    accelerator: str = "auto"
    precision: str = "32-true"
    data_dir: Path = Path("data")
    download: bool = False
    resume: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Setup:
    """What is compared: the settings with every default filled in.

    Attributes:
        methods: The methods that are run, in the order of the table.
        p: The ``p`` of each method; None where it has none, or where it is measured.
        costs_like: For each method whose ``p`` is measured, the ``p`` of the method whose FLOPs
            it has to match.
        model: The network.
        data: The name of the images.
        train_size: The number of training images; None for all.
        val_size: The number of validation images.
        threads: The number of CPU threads; None for torch's choice.
        recipe: How the network is trained.
        left_out: The methods that ``all`` left out, since the network has no place for them.
    """

    methods: list[str]
    p: dict[str, float | None]
    costs_like: dict[str, float | None]
    model: Model
    data: str
    train_size: int | None
    val_size: int
    threads: int | None
    recipe: Recipe
    left_out: list[str]


def set_up(settings: Settings) -> Setup:
    """Fill in the defaults, and check everything that can be checked before data is read.

    Raises:
        UserError: A setting names something that does not exist, or is out of range.
    """
    _check_numbers(settings)
    if settings.preset is not None and settings.preset not in PRESETS:
        raise UserError(
            f"there is no preset {settings.preset!r}; choose one of {', '.join(sorted(PRESETS))}"
        )
    chosen = preset(settings.preset, settings.model) if settings.preset else None
    model = open_model(settings.model or (chosen.model if chosen else DEFAULT_MODEL))
    methods, left_out = _chosen_methods(settings, chosen, model)
    defaults = {name: p for name, p in chosen.methods.items() if p is not None} if chosen else {}
    p = rates(methods, settings.p, defaults)
    data = settings.data or (chosen.data if chosen else DEFAULT_DATA)
    train_size, val_size = settings.train_size, settings.val_size
    if train_size is None:
        train_size = chosen.train_size if chosen else DEFAULT_TRAIN_SIZES.get(data)
    if val_size is None:
        val_size = chosen.val_size if chosen else 0
    return Setup(
        methods=methods,
        p=p,
        costs_like=_p_to_match(methods, p, settings.p),
        model=model,
        data=data,
        train_size=train_size,
        val_size=val_size,
        threads=settings.threads or _default_threads(settings, data),
        recipe=_recipe(settings, chosen.recipe if chosen else default_recipe(), val_size),
        left_out=left_out,
    )


def _chosen_methods(
    settings: Settings, chosen: Preset | None, model: Model
) -> tuple[list[str], list[str]]:
    """Return the methods to run, in the order of the table, and those that ``all`` leaves out."""
    methods = settings.methods or (
        tuple(chosen.methods) if chosen else model.methods or DEFAULT_METHODS
    )
    for name in methods:
        if name not in METHODS and name != ALL:
            raise UserError(
                f"there is no method {name!r}; the methods are {', '.join(METHODS)}, or {ALL}"
            )
    left_out: list[str] = []
    if ALL in methods:
        left_out = _without_place(model, [name for name in METHODS if name not in methods])
        methods = tuple(name for name in METHODS if name not in left_out)
    # Every cost is divided by that of "none", so it is always run.
    return [name for name in METHODS if name in {NONE, *methods}], left_out


def _without_place(model: Model, names: Sequence[str]) -> list[str]:
    """Return the methods that the network has no place for.

    Raises:
        UserError: The network cannot be built.
    """
    net = model.build(10, model.channels or 3)
    found = []
    for name in names:
        try:
            # On a copy, since a method changes the network.
            METHODS[name].build(copy.deepcopy(net), METHODS[name].p or 0.0)
        except UserError:
            found.append(name)
    return [name for name in names if name in found or METHODS[name].costs_like in found]


def _p_to_match(
    methods: Sequence[str], p: dict[str, float | None], given: Sequence[str]
) -> dict[str, float | None]:
    """Return, for each method whose ``p`` is to be measured, the ``p`` of the method it follows."""
    found = {}
    for name in methods:
        other = METHODS[name].costs_like
        if other is not None and p[name] is None:
            for_all = [entry for entry in given if "=" not in entry]
            found[name] = p[other] if other in p else rates([other], for_all)[other]
    return found


def _default_threads(settings: Settings, data: str) -> int | None:
    """Return 1 for the default network on the default data, else None: as many as torch takes.

    The steps of the default run are so small that a second thread gains a quarter at best, and
    where another program uses the other core, threads wait for each other: a step then took 16
    times as long, measured on two cores.
    """
    default_run = settings.model is None and settings.preset is None and data == DEFAULT_DATA
    return 1 if default_run else None


def _check_numbers(settings: Settings) -> None:
    numbers = (
        ("seeds", settings.seeds),
        ("epochs", settings.epochs),
        ("batch-size", settings.batch_size),
        ("train-size", settings.train_size),
        ("test-size", settings.test_size),
        ("image-size", settings.image_size),
        ("cost-steps", settings.cost_steps),
        ("threads", settings.threads),
        ("devices", settings.devices),
    )
    with value_errors_for_user():
        for name, value in numbers:
            if value is not None:
                check_whole(value, f"--{name}", 1)
        if settings.val_size is not None:
            check_whole(settings.val_size, "--val-size", 0)
    if settings.learning_rate is not None and not 0 < settings.learning_rate < float("inf"):
        raise UserError(f"--lr has to be a positive number, but got {settings.learning_rate}")
    if settings.augment is not None and settings.augment not in AUGMENTATIONS:
        raise UserError(
            f"there is no augmentation {settings.augment!r}; "
            f"choose one of {', '.join(AUGMENTATIONS)}"
        )


def _recipe(settings: Settings, recipe: Recipe, val_size: int) -> Recipe:
    if settings.epochs is not None:
        recipe = recipe.with_epochs(settings.epochs)
    if settings.learning_rate is not None:
        recipe = recipe.with_learning_rate(settings.learning_rate)
    if settings.batch_size is not None:
        recipe = replace(recipe, batch_size=settings.batch_size)
    if settings.augment is not None:
        recipe = replace(recipe, augment=settings.augment)
    return replace(recipe, select="best_validation" if val_size else "last")


def config_of(settings: Settings, setup: Setup) -> dict[str, Any]:
    """Return everything that the figures depend on, apart from versions and the machine."""
    return {
        "model": setup.model.name,
        "data": setup.data,
        "train_size": setup.train_size,
        "val_size": setup.val_size,
        "test_size": settings.test_size,
        "image_size": settings.image_size,
        "methods": setup.p,
        "costs_like": setup.costs_like,
        "seeds": settings.seeds,
        "recipe": asdict(setup.recipe),
        "cost_steps": settings.cost_steps,
        "threads": setup.threads,
        "devices": settings.devices,
        "accelerator": settings.accelerator,
        "precision": settings.precision,
    }
