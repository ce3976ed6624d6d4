"""How a network is trained: epochs, learning rates, batches, and the recipes of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["AUGMENTATIONS", "PRESETS", "Preset", "Recipe", "default_recipe", "preset"]

AUGMENTATIONS = ("none", "shift", "flip-shift")


@dataclass(frozen=True)
class Recipe:
    """The training hyperparameters, which are the same for every method.

    Attributes:
        epochs: Passes over the training images.
        phases: Pairs of a first epoch (counted from 0) and the learning rate from there on.
        batch_size: Images in a training step, over all devices.
        momentum: Nesterov momentum, without dampening.
        weight_decay: The L2 penalty on every parameter.
        augment: ``"none"``, ``"shift"`` (by up to 4 pixels) or ``"flip-shift"`` (half of the
            images mirrored too).
        select: The epoch that is reported: the ``"last"``, or ``"best_validation"`` for the one
            with the lowest validation error.
    """

    epochs: int
    phases: tuple[tuple[int, float], ...]
    batch_size: int
    momentum: float = 0.9
    weight_decay: float = 1e-4
    augment: str = "none"
    select: str = "last"

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        return [rate for start, rate in self.phases if start <= epoch][-1]

    def with_epochs(self, epochs: int) -> Recipe:
        """Return the recipe with another number of epochs; phases keep their share of them."""
        # Starts are rounded half up: a run of one epoch then has the highest learning rate.
        phases = tuple(
            ((2 * start * epochs + self.epochs) // (2 * self.epochs), rate)
            for start, rate in self.phases
        )
        return replace(self, epochs=epochs, phases=phases)

    def with_learning_rate(self, rate: float) -> Recipe:
        """Return the recipe with another highest learning rate; phases keep their ratio to it."""
        highest = max(phase_rate for _, phase_rate in self.phases)
        phases = tuple((start, phase * rate / highest) for start, phase in self.phases)
        return replace(self, phases=phases)


def default_recipe() -> Recipe:
    """Return the recipe that is used without a preset.

    It has the phases of the paper's recipe in proportion, with half the learning rate and smaller
    batches, since short runs of deep networks diverge at the paper's learning rate
    (docs/development/design-notes.md).
    """
    return Recipe(epochs=60, phases=((0, 0.05), (30, 0.005), (45, 0.0005)), batch_size=50)


@dataclass(frozen=True)
class Preset:
    """A published experiment: network, data, sizes, methods with their ``p``, and recipe."""

    model: str
    data: str
    train_size: int
    val_size: int
    methods: Mapping[str, float | None]
    recipe: Recipe


_PAPER = Recipe(
    epochs=500,
    phases=((0, 0.1), (250, 0.01), (375, 0.001)),
    batch_size=128,
    augment="flip-shift",
    select="best_validation",
)
# Huang et al. 2016, section 4: with 1202 layers the paper warms up and trains 300 epochs.
_PAPER_1202 = replace(_PAPER, epochs=300, phases=((0, 0.01), (10, 0.1), (150, 0.01), (225, 0.001)))

PRESETS: dict[str, Preset] = {
    "paper-cifar10": Preset(
        model="resnet-110",
        data="torchvision:CIFAR10",
        train_size=45_000,
        val_size=5_000,
        methods={"none": None, "stochastic_depth_batch": 0.5},
        recipe=_PAPER,
    )
}


def preset(name: str, model: str | None = None) -> Preset:
    """Return the preset called ``name``, with the recipe that the paper uses for ``model``.

    Raises:
        KeyError: There is no preset of that name.
    """
    found = PRESETS[name]
    if model is not None:
        found = replace(found, model=model)
    if found.model == "resnet-1202":
        found = replace(found, recipe=_PAPER_1202)
    return found
