"""The result of :func:`torchdrop.diagnostics.variance_shift`: ratios of variances by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from torch import Tensor

from torchdrop.text_table import text_table

__all__ = ["LayerShift", "VarianceShift"]


@dataclass(frozen=True, eq=False)
class LayerShift:
    """The variance of the input of one layer, in training and in evaluation.

    Per channel and batch, with the unbiased variance ``var`` that BatchNorm puts into its running
    variance, and n values a channel in the batch::

        V = sum_b (n_b - 1) var(x_b) / sum_b (n_b - 1)         within batches
        T = var of the values of all batches and draws at once   (divided by their number)

    Attributes:
        name: The path of the BatchNorm, or the name of the residual branch that is added.
        kind: ``"batch_norm"``: its input. ``"residual_sum"``: the sum of skip and branch.
        ratio: The mean over channels of V_train / V_eval, V within batches: the variance that the
            running variance estimates over the one in evaluation. Channels that are constant in
            both are left out; a channel that is constant in evaluation only makes it infinite.
        var_train: The mean over channels of V in training.
        var_eval: The mean over channels of V in evaluation.
        total_ratio: The mean over channels of T_train / T_eval. T_train includes the variance of
            the batch means over the draws, which BatchNorm removes in training: in batch mode
            it exceeds ``ratio``.
        total_train: The mean over channels of T in training.
        total_eval: The mean over channels of T in evaluation.
        running_ratio: The mean over channels of running_var / V_eval, with the current running
            variance of the layer; None if it has none. In evaluation, the variance of the
            normalised output of the layer, before weight and bias, is about the inverse.
        running_var: The mean over channels of that running variance, or None.
        channel_ratios: V_train / V_eval of each channel, float64, of shape (channels,).
    """

    name: str
    kind: str
    ratio: float
    var_train: float
    var_eval: float
    total_ratio: float
    total_train: float
    total_eval: float
    running_ratio: float | None
    running_var: float | None
    channel_ratios: Tensor = field(repr=False)

    @property
    def shift(self) -> float:
        """``max(ratio, 1 / ratio)``: how far the ratio is from 1, in either direction."""
        if self.ratio == 0.0:
            return math.inf
        return max(self.ratio, 1.0 / self.ratio)


class VarianceShift(Sequence[LayerShift]):
    """The result of :func:`variance_shift`: a :class:`LayerShift` per layer, in order of depth.

    A sequence; ``shift["layer1.0.bn1"]`` finds a layer by its name (if a BatchNorm and a residual
    sum have the same name, the BatchNorm). ``print(shift)`` shows the table.

    Attributes:
        layers: The layers, as the first batch reached them in evaluation.
        unreadable: The modules whose forward could not be read, with the reason. Residual sums
            in them are not measured.
    """

    def __init__(
        self, model: str, layers: list[LayerShift], unreadable: dict[str, str], effort: str
    ) -> None:
        self.layers = layers
        self.unreadable = unreadable
        self._model = model
        self._effort = effort

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, key: int | str) -> LayerShift: ...

    @overload
    def __getitem__(self, key: slice) -> list[LayerShift]: ...

    def __getitem__(self, key: int | str | slice) -> LayerShift | list[LayerShift]:
        if not isinstance(key, str):
            return self.layers[key]
        for layer in sorted(self.layers, key=lambda layer: layer.kind):
            if layer.name == key:
                return layer
        raise KeyError(key)

    @property
    def batch_norms(self) -> list[LayerShift]:
        """The layers that are BatchNorms."""
        return [layer for layer in self.layers if layer.kind == "batch_norm"]

    @property
    def residual_sums(self) -> list[LayerShift]:
        """The layers that are residual sums."""
        return [layer for layer in self.layers if layer.kind == "residual_sum"]

    @property
    def largest(self) -> LayerShift:
        """The layer with the largest ``shift``: the ratio furthest from 1.

        Raises:
            ValueError: No layer was seen both in training and in evaluation.
        """
        known = [layer for layer in self.layers if not math.isnan(layer.ratio)]
        if not known:
            raise ValueError("no layer was reached both in training and in evaluation")
        return max(known, key=lambda layer: layer.shift)

    @property
    def growth(self) -> list[float]:
        """For each layer its ratio over that of the layer of its kind before it (1 for none)."""
        before: dict[str, float] = {}
        steps = []
        for layer in self.layers:
            previous = before.get(layer.kind, 1.0)
            usable = previous > 0.0 and math.isfinite(previous)
            steps.append(layer.ratio / previous if usable else math.nan)
            if not math.isnan(layer.ratio):
                before[layer.kind] = layer.ratio
        return steps

    @property
    def steepest(self) -> LayerShift:
        """The residual sum whose ratio grows most compared with that of the residual sum before.

        If there are no residual sums, the BatchNorm whose ratio grows most. (BatchNorms do not
        count otherwise: one inside a branch follows another one, which removes the shift.)

        Raises:
            ValueError: As for :attr:`largest`.
        """
        of_kind = self.residual_sums or self.batch_norms
        known = [
            (growth, layer)
            for growth, layer in zip(self.growth, self.layers, strict=True)
            if layer in of_kind and not math.isnan(growth)
        ]
        return max(known, key=lambda pair: pair[0])[1] if known else self.largest

    def __repr__(self) -> str:
        counts = f"{len(self.batch_norms)} batch norms, {len(self.residual_sums)} residual sums"
        lines = [f"variance shift of {self._model}: {counts}; {self._effort}"]
        rows: list[tuple[str, ...]] = [
            ("layer", "kind", "train", "eval", "ratio", "growth", "running / eval")
        ]
        for layer, growth in zip(self.layers, self.growth, strict=True):
            running = math.nan if layer.running_ratio is None else layer.running_ratio
            rows.append(
                (
                    layer.name,
                    layer.kind.replace("_", " "),
                    *map(_short, (layer.var_train, layer.var_eval, layer.ratio, growth, running)),
                )
            )
        lines += text_table(rows, right={2, 3, 4, 5, 6})
        if any(not math.isnan(layer.ratio) for layer in self.layers):
            lines.append(
                f"largest: {self.largest.name} ({_short(self.largest.ratio)}); "
                f"grows most at {self.steepest.name}"
            )
        lines += [
            f"not read: {name or 'the model'}: {why}" for name, why in self.unreadable.items()
        ]
        return "\n".join(lines)


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"
