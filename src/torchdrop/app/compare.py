"""The comparison: train the same network on the same data and seeds, once per method."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from .compare_settings import ALL, DEFAULT_METHODS, Settings, Setup, config_of, set_up
from .data import Batches, Data, open_source
from .errors import UserError, one_line
from .measure import Cost, Subject, count_step, largest_shift, time_steps
from .methods import METHODS, NONE, Applied
from .results import Results, check_resumable, locked
from .timing import threads
from .training import Run, check_devices, evaluate, mean_observed, train

__all__ = ["DEFAULT_METHODS", "Settings", "compare"]

TIMING_ROUNDS = 10
"""The most rounds in which the steps of a seed are timed."""

SHIFT_SEED = 0
"""The seed of the trained network that the variance shift is measured on."""


def compare(
    settings: Settings,
    say: Callable[[str], None] = print,
    finish: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run the comparison, or the runs that are missing, and return the content of results.json.

    Args:
        settings: What to compare.
        say: Called with each line to print.
        finish: Called with the content at the end, while the folder is still locked, to print it
            and to write the report.

    Raises:
        UserError: A setting is wrong, or a run fails; the message is one line on what to do.
        KeyboardInterrupt: The user stopped it. The finished runs are in results.json.
    """
    setup = set_up(settings)
    check_devices(settings.devices, settings.accelerator, settings.precision)
    if settings.resume:
        check_resumable(settings.out)  # before the lock makes the folder
    with threads(setup.threads), locked(settings.out):
        results = Results(settings.out, config_of(settings, setup), settings.resume)
        if not settings.resume:
            # Checkpoints without results: nothing says which settings they belong to.
            shutil.rmtree(settings.out / "runs", ignore_errors=True)
        _Comparison(settings, setup, results, say).run()
        if finish is not None:
            finish(results.content)
        return results.content


class _Comparison:
    """One comparison: measures the costs of all methods, then trains the runs that are missing."""

    def __init__(
        self, settings: Settings, setup: Setup, results: Results, say: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self.setup = setup
        self.results = results
        self.say = say
        self.p = dict(setup.p)
        self.drawn: dict[int, Data] = {}

    def run(self) -> None:
        settings, setup = self.settings, self.setup
        self._announce()
        missing = [
            (name, seed)
            for seed in range(settings.seeds)
            for name in setup.methods
            if not self.results.finished(name, seed)
        ]
        if missing:
            self.source = open_source(
                setup.data,
                image_size=settings.image_size,
                test_size=settings.test_size,
                data_dir=settings.data_dir,
                download=settings.download,
            )
            self._measure_costs()
            total = settings.seeds * len(setup.methods)
            for number, (name, seed) in enumerate(missing, total - len(missing)):
                self._train(name, seed, number, total)
        self.results.save(complete=True)
        shutil.rmtree(settings.out / "runs", ignore_errors=True)

    def _announce(self) -> None:
        """Say which methods are run that were not asked for, and which are not run."""
        asked, setup = self.settings.methods, self.setup
        if asked is not None and not {NONE, ALL} & set(asked):
            self.say(f"{NONE} is run too: the costs of the other methods are divided by its costs")
        if setup.left_out:
            self.say(
                f"left out, since {setup.model.name} has no place for them: "
                f"{', '.join(setup.left_out)} (ask for one by its name to see why)"
            )

    def _data(self, seed: int) -> Data:
        if seed not in self.drawn:
            # Only one seed's images are kept, since a data set may be large.
            self.drawn = {seed: self.source.draw(seed, self.setup.train_size, self.setup.val_size)}
        return self.drawn[seed]

    def _channels(self) -> int:
        return self.setup.model.channels or self.source.pool.pixels.shape[1]

    def _build(self, name: str, seed: int) -> tuple[nn.Module, Applied]:
        """Return a network with the initial weights of the seed, and the method applied to it."""
        torch.manual_seed(seed)
        model = self.setup.model.build(self.source.classes, self._channels())
        return model, METHODS[name].build(model, self.p[name] or 0.0)

    def _subject(self, name: str, seed: int) -> Subject:
        return self._subject_of(*self._build(name, seed), seed)

    def _subject_of(self, model: nn.Module, applied: Applied, seed: int) -> Subject:
        batches = Batches(
            self._data(seed),
            batch_size=self.setup.recipe.batch_size,
            seed=seed,
            channels=self._channels(),
            augment=self.setup.recipe.augment,
        )
        return Subject(model, applied, batches, self.setup.recipe, _device(self.settings))

    def _measure_costs(self) -> None:
        """Measure every method at every seed.

        A network on which a method fails is found here, before anything is trained.
        """
        costs = self.results.content["costs"]
        unmeasured = {
            seed: [name for name in self.setup.methods if name not in costs.get(str(seed), {})]
            for seed in range(self.settings.seeds)
        }
        if any(unmeasured.values()):
            self.say("measuring what a training step of each method costs")
        counted: dict[tuple[str, int], Cost] = {}
        for name in self.setup.methods:
            if name in self.setup.costs_like:
                self.p[name] = self._p_to_cost_like(name, counted)
            self.results.begin(name, summary=METHODS[name].summary, p=self.p[name])
        for seed, names in unmeasured.items():
            if not names:
                continue
            # All methods are timed again: only times taken side by side are comparable.
            subjects = {name: self._subject(name, seed) for name in self.setup.methods}
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
        """Return the share of samples to leave out for the FLOPs of the method that it follows.

        It is measured at seed 0 and used at every seed.
        """
        known: float | None = self.results.begin(name).get("p")
        if known is not None:
            return known
        other = METHODS[name].costs_like
        assert other is not None
        self.p[other] = self.setup.costs_like[name]
        for each in (NONE, other):
            counted[each, 0] = self._count(each, 0, self._subject(each, 0))
        return max(0.0, 1.0 - counted[other, 0].flops / counted[NONE, 0].flops)

    def _count(self, name: str, seed: int, subject: Subject) -> Cost:
        try:
            cost = count_step(subject, self.settings.cost_steps, seed)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shape = "x".join(map(str, (self._channels(), *self.source.pool.pixels.shape[2:])))
            raise UserError(
                f"a training step of {self.setup.model.name} with {name} fails on batches of "
                f"{shape} images: {one_line(error)}; try another --image-size or --batch-size"
            ) from error
        if not subject.applied.reached:
            raise UserError(
                f"{name} changed nothing in a training step of {self.setup.model.name}, which does "
                f"not call the modules that {name} acts on; leave {name} out of --methods"
            )
        return cost

    def _train(self, name: str, seed: int, number: int, total: int) -> None:
        """Train one method at one seed, and add its figures to the results."""
        settings, epochs = self.settings, self.setup.recipe.epochs
        model, applied = self._build(name, seed)
        data, channels = self._data(seed), self._channels()
        start = time.monotonic()
        run = Run(
            label=f"{name}  seed {seed}",
            model=model,
            channels=channels,
            applied=applied,
            data=data,
            recipe=self.setup.recipe,
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
        model.to(_device(settings))  # Lightning leaves it on the CPU
        test = evaluate(model, data.test, data, channels)
        best = self.setup.recipe.select == "best_validation"
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
        # Only now: until the figures are saved, a resumed comparison needs the files of the run.
        shutil.rmtree(run.folder, ignore_errors=True)
        self.say(
            f"{number + 1:>3}/{total}  {name} seed {seed}: "
            f"test error {test.error:.2%} in {seconds:.1f} s"
        )


def _device(settings: Settings) -> str:
    """Return the device that costs are measured on: the one that Lightning trains on."""
    if settings.accelerator == "cpu" or not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type
