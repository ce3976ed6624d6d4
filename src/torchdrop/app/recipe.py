"""How a network is trained: lengths, learning rates, and the recipes of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["AUGMENTATIONS", "PRESETS", "Preset", "Recipe", "default_recipe", "preset"]

AUGMENTATIONS = ("none", "shift", "flip-shift")


@dataclass(frozen=True)
class Recipe:
    """Everything about training that is the same for every method.

    Attributes:
        epochs: Passes over the training images.
        phases: Pairs of the first epoch (from 0) and the learning rate from there on.
        batch_size: Images a step, over all devices.
        momentum: Nesterov's, without dampening.
        weight_decay: Added to the gradient, for every parameter.
        augment: ``"none"``, ``"shift"`` (up to 4 pixels) or ``"flip-shift"`` (and mirrored).
        select: Which epoch is reported: the ``"last"``, or the one of ``"best_validation"`` error.
    """

    epochs: int
    phases: tuple[tuple[int, float], ...]
    batch_size: int
    momentum: float = 0.9
    weight_decay: float = 1e-4
    augment: str = "none"
    select: str = "last"

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return [rate for start, rate in self.phases if start <= epoch][-1]

    def with_epochs(self, epochs: int) -> Recipe:
        """The same recipe stretched to another length: phases keep their share of it."""
        # Rounded half up, so that even one epoch starts at the highest rate.
        phases = tuple(
            ((2 * start * epochs + self.epochs) // (2 * self.epochs), rate)
            for start, rate in self.phases
        )
        return replace(self, epochs=epochs, phases=phases)

    def with_learning_rate(self, rate: float) -> Recipe:
        """The same recipe with another highest learning rate: phases keep their ratio to it."""
        highest = max(phase_rate for _, phase_rate in self.phases)
        phases = tuple((start, phase * rate / highest) for start, phase in self.phases)
        return replace(self, phases=phases)


def default_recipe() -> Recipe:
    """The recipe without a preset, chosen by measurement (docs/development/design-notes.md).

    The paper's in proportion, at half its learning rate and on smaller batches: short runs of deep
    networks diverge at its own.
    """
    return Recipe(epochs=60, phases=((0, 0.05), (30, 0.005), (45, 0.0005)), batch_size=50)


@dataclass(frozen=True)
class Preset:
    """A whole experiment: network, data, sizes, methods with their ``p``, and recipe."""

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
    """The preset called ``name``, with the recipe that the paper gives to ``model``.

    Raises:
        KeyError: There is none of that name.
    """
    found = PRESETS[name]
    if model is not None:
        found = replace(found, model=model)
    if found.model == "resnet-1202":
        found = replace(found, recipe=_PAPER_1202)
    return found
