"""One entry of the table of operations, and how a sum or a drop probability is read from a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

__all__ = ["MASK_RATE_ATTRIBUTES", "RATE_NAMES", "DropForm", "Operation", "SumForm"]

# The attributes that hold the drop probability of a layer that drops whole residual branches.
MASK_RATE_ATTRIBUTES = ("p", "drop_prob")

# The names under which functions and layers take a drop probability, the likeliest first.
RATE_NAMES = (
    *MASK_RATE_ATTRIBUTES, "dropout_p", "beta", "drop_rate", "rate", "prob", "dropout",
)  # fmt: skip


@dataclass(frozen=True)
class SumForm:
    """How to read ``left + gain * right`` from a call.

    Attributes:
        left: The name of the parameter that takes the left summand.
        right: The name of the parameter that takes the right summand.
        sign: 1 for an addition, -1 for a subtraction.
        factor: The name of a parameter that multiplies the right summand, if there is one.
        pad_dim: The name of a parameter that says on which dimension the smaller summand is padded
            with zeros, if there is one.
    """

    left: str = "input"
    right: str = "other"
    sign: float = 1.0
    factor: str | None = None
    pad_dim: str | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters of the call in order: the positional ones, then the factor."""
        return tuple(p for p in (self.left, self.right, self.pad_dim, self.factor) if p)


@dataclass(frozen=True)
class DropForm:
    """Where a function or a layer that drops has its drop probability.

    Attributes:
        rates: The names of the parameters that may be the probability, the likeliest first; empty
            if the arguments do not tell the probability.
        parameters: The parameters in order, for a function written in C, which has no signature.
        default: The probability if a function written in C is called without one; None if it is
            not known.
    """

    rates: tuple[str, ...] = RATE_NAMES
    parameters: tuple[str, ...] = ("input", "p", "training")
    default: float | None = None

    def rate(self, node: fx.Node) -> float | None:
        """Return the drop probability of the call ``node``: 0 if it is off, None if not known."""
        given = self._arguments(node)
        if given.get("training") is False:
            return 0.0
        value = next((given[name] for name in self.rates if name in given), self.default)
        return float(value) if isinstance(value, int | float) else None

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        """Return the arguments of the call ``node`` by the names of the parameters."""
        if inspect.isfunction(node.target):
            try:
                bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
            except TypeError:
                return dict(node.kwargs)
            bound.apply_defaults()
            return bound.arguments
        return {**dict(zip(self.parameters, node.args, strict=False)), **node.kwargs}


@dataclass(frozen=True, eq=False)  # by identity: the whole table is the key of a cache
class Operation:
    """What is known about one operation, under all its names.

    Attributes:
        names: What the functions and methods are called: ``__name__`` of a function, also of an
            operator such as ``operator.add``; the name of a method of ``Tensor``.
        in_place: The names of those that write into their first argument. Names that end in an
            underscore and are not in the table are assumed to do so as well.
        functions: Functions that are not found under their name in ``operator``, ``torch`` or
            ``torch.nn.functional``, or that have none.
        attributes: The names of attributes of a tensor, or of what another operation returns.
        layers: Module classes that do the same. A subclass counts if it inherits the forward.
        layer_names: The class names of layers that are recognised by name, so that copies of the
            class in other packages count as well.
        linear: It is linear in its inputs, or affine. Norms, pooling and dropout count as linear,
            as they may be on a shortcut.
        product: It is linear in each factor, so it is linear if only one depends on the input.
        pools: It counts as linear, like pooling, if it has one input (a maximum over a dimension).
        view: What it returns may share the memory of its first argument.
        copies: It returns its input, or a copy with the same values.
        keeps_layout: Dimension i of its result corresponds to dimension i of its inputs.
        keeps_order: It returns the entries of its input in their order, in another shape.
        moves_dims: A layer of torch that moves entries from one dimension to another.
        batch_first: A layer that takes the batch on the first dimension.
        on_numbers: It is also used on Python numbers such as sizes, and returns a number or bool.
        reads_shape: It reads the shape, dtype or device of a tensor, not its values.
        reads_device: It reads the device.
        factory: A function of ``torch`` that creates a tensor without a tensor as its input.
        sizes: The position of the first argument that gives the size of the tensor it creates.
        draws_mask: It creates a tensor of random numbers, or fills one, as for a drop mask.
        mask_factor: It may apply a drop mask: one input is the mask, another the activation.
        concatenates: It concatenates tensors.
        stacks: It stacks tensors on a new dimension.
        adds_entries: It adds the entries of a dimension.
        blends: It blends two tensors with a weight, so that none of them is a shortcut.
        returns_tuple: It returns several tensors.
        batch_norm: It normalises with the statistics of the batch.
        masks_branch: A layer that drops whole residual branches by multiplying with a mask.
        sum: How to read the two summands from it, if it adds or subtracts.
        drops: How to read the drop probability from it, if it drops or draws a drop mask.
        spelled_out: A function that computes the same in plain operations. The tracer calls it with
            the same arguments instead of a fused operation, and records the plain ones.
    """

    names: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    attributes: tuple[str, ...] = ()
    layers: tuple[type[nn.Module], ...] = ()
    layer_names: tuple[str, ...] = ()
    linear: bool = False
    product: bool = False
    pools: bool = False
    view: bool = False
    copies: bool = False
    keeps_layout: bool = False
    keeps_order: bool = False
    moves_dims: bool = False
    batch_first: bool = False
    on_numbers: bool = False
    reads_shape: bool = False
    reads_device: bool = False
    factory: bool = False
    sizes: int | None = None
    draws_mask: bool = False
    mask_factor: bool = False
    concatenates: bool = False
    stacks: bool = False
    adds_entries: bool = False
    blends: bool = False
    returns_tuple: bool = False
    batch_norm: bool = False
    masks_branch: bool = False
    sum: SumForm | None = None
    drops: DropForm | None = None
    spelled_out: Callable[..., Any] | None = None
