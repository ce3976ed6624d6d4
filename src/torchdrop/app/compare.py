"""The comparison: the same network, data and seeds, once per method."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import Batches, Data, open_source
from .errors import UserError, one_line
from .measure import Cost, Subject, count_step, largest_shift, time_steps
from .methods import METHODS, Applied, rates
from .models import Model, open_model
from .recipe import AUGMENTATIONS, PRESETS, Recipe, default_recipe, preset
from .results import Results, check_resumable, locked
from .timing import threads
from .training import Run, check_devices, evaluate, mean_observed, train

__all__ = ["DEFAULT_METHODS", "Settings", "compare"]

DEFAULT_METHODS = (
    "none",
    "dropout",
    "drop_path",
    "stochastic_depth_row",
    "stochastic_depth_batch",
    "subsample",
)
ALL = "all"
"""Instead of names: every method that has a place in the network."""

DEFAULT_MODEL = "resnet-20"
DEFAULT_DATA = "digits"
DEFAULT_TRAIN_SIZES = {"digits": 200}
"""Few enough that a network without regularisation overfits (docs/development/design-notes.md)."""

TIMING_ROUNDS = 10
"""Of each seed, at most."""

SHIFT_SEED = 0
"""The seed whose network the variance shift is measured on, once it is trained."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for. None means: as the preset or the default has it."""

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
class _Plan:
    """The settings with every default filled in."""

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


def _resolved(settings: Settings) -> _Plan:
    """Fill in the defaults; refuse what can be refused without reading data.

    Raises:
        UserError: Something asked for does not exist or is out of range.
    """
    _check_numbers(settings)
    if settings.preset is not None and settings.preset not in PRESETS:
        raise UserError(
            f"there is no preset {settings.preset!r}; there is {', '.join(sorted(PRESETS))}"
        )
    chosen = preset(settings.preset, settings.model) if settings.preset else None
    model = open_model(settings.model or (chosen.model if chosen else DEFAULT_MODEL))
    methods = settings.methods or (
        tuple(chosen.methods) if chosen else model.methods or DEFAULT_METHODS
    )
    for name in methods:
        if name not in METHODS and name != ALL:
            raise UserError(
                f"there is no method {name!r}; the methods are {', '.join(METHODS)}, or all"
            )
    left_out: list[str] = []
    if ALL in methods:
        left_out = _without_place(model, [name for name in METHODS if name not in methods])
        methods = tuple(name for name in METHODS if name not in left_out)
    # Every ratio is over "none", so it is always run.
    ordered = [name for name in METHODS if name in {"none", *methods}]
    defaults = {name: p for name, p in chosen.methods.items() if p is not None} if chosen else {}
    p = rates(ordered, settings.p, defaults)
    data = settings.data or (chosen.data if chosen else DEFAULT_DATA)
    train_size, val_size = settings.train_size, settings.val_size
    if train_size is None:
        train_size = chosen.train_size if chosen else DEFAULT_TRAIN_SIZES.get(data)
    if val_size is None:
        val_size = chosen.val_size if chosen else 0
    return _Plan(
        methods=ordered,
        p=p,
        costs_like=_followed(ordered, p, settings.p),
        model=model,
        data=data,
        train_size=train_size,
        val_size=val_size,
        threads=settings.threads or _default_threads(settings, data),
        recipe=_recipe(settings, chosen.recipe if chosen else default_recipe(), val_size),
        left_out=left_out,
    )


def _followed(
    methods: Sequence[str], p: dict[str, float | None], given: Sequence[str]
) -> dict[str, float | None]:
    """For each method whose ``p`` is to be measured, the ``p`` of the one whose costs it has."""
    found = {}
    for name in methods:
        other = METHODS[name].costs_like
        if other is not None and p[name] is None:
            general = [entry for entry in given if "=" not in entry]
            found[name] = p[other] if other in p else rates([other], general)[other]
    return found


def _without_place(model: Model, names: Sequence[str]) -> list[str]:
    """Which of the methods have no place in a network.

    Raises:
        UserError: The network cannot be built.
    """
    net = model.build(10, model.channels or 3)
    found = []
    for name in names:
        try:
            # Each on a network of its own: a method changes it.
            METHODS[name].build(copy.deepcopy(net), METHODS[name].p or 0.0)
        except UserError:
            found.append(name)
    return [name for name in names if name in found or METHODS[name].costs_like in found]


def _default_threads(settings: Settings, data: str) -> int | None:
    """One thread for the embedded run, else None: as many as torch takes.

    Its steps are so small that a second thread gains a quarter at best, and where another program
    has the other core the threads wait for each other: 16 times slower, measured.
    """
    embedded = settings.model is None and settings.preset is None and data == DEFAULT_DATA
    return 1 if embedded else None


def _check_numbers(settings: Settings) -> None:
    for name, value in (
        ("seeds", settings.seeds),
        ("epochs", settings.epochs),
        ("batch-size", settings.batch_size),
        ("train-size", settings.train_size),
        ("test-size", settings.test_size),
        ("image-size", settings.image_size),
        ("cost-steps", settings.cost_steps),
        ("threads", settings.threads),
        ("devices", settings.devices),
    ):
        if value is not None and value < 1:
            raise UserError(f"--{name} has to be 1 or more, but got {value}")
    if settings.val_size is not None and settings.val_size < 0:
        raise UserError(f"--val-size has to be 0 or more, but got {settings.val_size}")
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


def _config(settings: Settings, plan: _Plan) -> dict[str, Any]:
    """What the figures depend on, apart from versions and the machine."""
    return {
        "model": plan.model.name,
        "data": plan.data,
        "train_size": plan.train_size,
        "val_size": plan.val_size,
        "test_size": settings.test_size,
        "image_size": settings.image_size,
        "methods": plan.p,
        "costs_like": plan.costs_like,
        "seeds": settings.seeds,
        "recipe": asdict(plan.recipe),
        "cost_steps": settings.cost_steps,
        "threads": plan.threads,
        "devices": settings.devices,
        "accelerator": settings.accelerator,
        "precision": settings.precision,
    }


def compare(
    settings: Settings,
    say: Callable[[str], None] = print,
    finish: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run the comparison, or what is left of it, and return the content of results.json.

    Args:
        settings: What to compare.
        say: Called with a line for each thing worth telling.
        finish: Called with the content, to write what is made of it: the folder is still held.

    Raises:
        UserError: Bad input, with one line on what to do.
        KeyboardInterrupt: The user stopped it. What is finished is in results.json.
    """
    plan = _resolved(settings)
    check_devices(settings.devices, settings.accelerator, settings.precision)
    if settings.resume:
        check_resumable(settings.out)  # before the folder is made
    with threads(plan.threads), locked(settings.out):
        results = Results(settings.out, _config(settings, plan), settings.resume)
        if not settings.resume:
            # Without results nobody knows what such checkpoints are of.
            shutil.rmtree(settings.out / "runs", ignore_errors=True)
        _Comparison(settings, plan, results, say).run()
        if finish is not None:
            finish(results.content)
        return results.content


class _Comparison:
    def __init__(
        self, settings: Settings, plan: _Plan, results: Results, say: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self.plan = plan
        self.results = results
        self.say = say
        self.p = dict(plan.p)
        self.drawn: dict[int, Data] = {}

    def run(self) -> None:
        settings, plan = self.settings, self.plan
        if settings.methods is not None and not {"none", ALL} & set(settings.methods):
            self.say("none is run too: the costs of the others are over its own")
        if plan.left_out:
            self.say(
                f"left out, since they have no place in {plan.model.name}: "
                f"{', '.join(plan.left_out)} (asked for by name, each says why)"
            )
        missing = [
            (name, seed)
            for seed in range(settings.seeds)
            for name in plan.methods
            if not self.results.finished(name, seed)
        ]
        if missing:
            self.source = open_source(
                plan.data,
                image_size=settings.image_size,
                test_size=settings.test_size,
                data_dir=settings.data_dir,
                download=settings.download,
            )
            self._measure_costs()
            total = settings.seeds * len(plan.methods)
            for number, (name, seed) in enumerate(missing, total - len(missing)):
                self._train(name, seed, number, total)
        self.results.save(complete=True)
        shutil.rmtree(settings.out / "runs", ignore_errors=True)

    def _data(self, seed: int) -> Data:
        if seed not in self.drawn:
            # One at a time: a large data set is not held once a seed.
            self.drawn = {seed: self.source.draw(seed, self.plan.train_size, self.plan.val_size)}
        return self.drawn[seed]

    def _channels(self) -> int:
        return self.plan.model.channels or self.source.pool.pixels.shape[1]

    def _build(self, name: str, seed: int) -> tuple[nn.Module, Applied]:
        """A network with the weights that all methods start from at a seed, and the method."""
        torch.manual_seed(seed)
        model = self.plan.model.build(self.source.classes, self._channels())
        return model, METHODS[name].build(model, self.p[name] or 0.0)

    def _subject(self, name: str, seed: int) -> Subject:
        return self._subject_of(*self._build(name, seed), seed)

    def _subject_of(self, model: nn.Module, applied: Applied, seed: int) -> Subject:
        batches = Batches(
            self._data(seed),
            batch_size=self.plan.recipe.batch_size,
            seed=seed,
            channels=self._channels(),
            augment=self.plan.recipe.augment,
        )
        return Subject(model, applied, batches, self.plan.recipe, _device(self.settings))

    def _measure_costs(self) -> None:
        """Measure every method at every seed. This is also where a network that fails, fails."""
        costs = self.results.content["costs"]
        lacking = {
            seed: [name for name in self.plan.methods if name not in costs.get(str(seed), {})]
            for seed in range(self.settings.seeds)
        }
        if any(lacking.values()):
            self.say("measuring what a training step of each method costs")
        counted: dict[tuple[str, int], Cost] = {}
        for name in self.plan.methods:
            if name in self.plan.costs_like:
                self.p[name] = self._p_to_cost_like(name, counted)
            self.results.begin(name, summary=METHODS[name].summary, p=self.p[name])
        for seed, names in lacking.items():
            if not names:
                continue
            # All of them: step times are comparable only where they were taken side by side.
            subjects = {name: self._subject(name, seed) for name in self.plan.methods}
            found = dict(costs.get(str(seed), {}))
            for name in names:
                subject = subjects[name]
                self.results.begin(name, asked_p=subject.applied.asked)
                if (name, seed) not in counted:
                    counted[name, seed] = self._count(name, seed, subject)
                found[name] = asdict(counted[name, seed])
            rounds = min(TIMING_ROUNDS, self.settings.cost_steps)
            times = time_steps(subjects, rounds, seed)
            self.results.set_costs(
                seed, {name: {**found[name], "step_ms": times[name]} for name in subjects}
            )
            self.results.save()

    def _p_to_cost_like(self, name: str, counted: dict[tuple[str, int], Cost]) -> float:
        """The ``p`` with which leaving out samples costs what another method costs.

        Seed 0 decides: a method is the same one at every seed.
        """
        known: float | None = self.results.begin(name).get("p")
        if known is not None:
            return known
        other = METHODS[name].costs_like
        assert other is not None
        self.p[other] = self.plan.costs_like[name]
        for each in ("none", other):
            counted[each, 0] = self._count(each, 0, self._subject(each, 0))
        return max(0.0, 1.0 - counted[other, 0].flops / counted["none", 0].flops)

    def _count(self, name: str, seed: int, subject: Subject) -> Cost:
        try:
            cost = count_step(subject, self.settings.cost_steps, seed)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shape = "x".join(map(str, (self._channels(), *self.source.pool.pixels.shape[2:])))
            raise UserError(
                f"a training step of {self.plan.model.name} with {name} fails on batches of "
                f"{shape} images: {one_line(error)}; try another --image-size or --batch-size"
            ) from error
        if not subject.applied.reached:
            raise UserError(
                f"{name} changed nothing in a training step of {self.plan.model.name}: the forward "
                f"of the network does not call the modules that {name} goes to; leave {name} out "
                f"of --methods"
            )
        return cost

    def _train(self, name: str, seed: int, number: int, total: int) -> None:
        """Train one method at one seed, and put its figures into the results."""
        settings, epochs = self.settings, self.plan.recipe.epochs
        model, applied = self._build(name, seed)
        data, channels = self._data(seed), self._channels()
        start = time.monotonic()
        run = Run(
            label=f"{name}  seed {seed}",
            model=model,
            channels=channels,
            applied=applied,
            data=data,
            recipe=self.plan.recipe,
            seed=seed,
            folder=settings.out / "runs" / f"{name}-{seed}",
            devices=settings.devices,
            accelerator=settings.accelerator,
            precision=settings.precision,
            done=number * epochs,
            total=total * epochs,
            show=settings.progress,
        )
        history = train(run, resume=settings.resume)
        seconds = time.monotonic() - start
        model.to(_device(settings))  # Lightning hands it back on the CPU
        test = evaluate(model, data.test, data, channels)
        best = self.plan.recipe.select == "best_validation"
        if seed == SHIFT_SEED:
            shift = largest_shift(self._subject_of(model, applied, seed))
            self.results.begin(name, variance_shift=shift)
        self.results.add(
            name,
            seed,
            test_error=test.error,
            train_error=evaluate(model, data.train, data, channels).error,
            test_nll=test.nll,
            **self.results.content["costs"][str(seed)][name],
            observed_p=mean_observed(history),
            epoch=history.best_epoch if best else epochs,
            seconds=seconds,
            curves=asdict(history),
        )
        self.results.save()
        # Not earlier: until its figures are in the results, what it left is all there is of it.
        shutil.rmtree(run.folder, ignore_errors=True)
        self.say(
            f"{number + 1:>3}/{total}  {name} seed {seed}: "
            f"test error {test.error:.2%} in {seconds:.1f} s"
        )


def _device(settings: Settings) -> str:
    """The device that the costs are measured on: the one that Lightning would train on."""
    if settings.accelerator == "cpu" or not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type
