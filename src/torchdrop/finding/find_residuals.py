"""List the residual blocks of a model, and what is not taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from torchdrop.checks import check_model
from torchdrop.finding.example_calls import Example
from torchdrop.finding.not_taken import reasons_not_taken
from torchdrop.finding.residual import Residual
from torchdrop.finding.survey import survey

__all__ = ["Residuals", "find_residuals"]


class Residuals(list[Residual]):
    """Residual blocks, and what else was read.

    Attributes:
        not_taken: Each module with a sum that is not in the list: its path, and the reason with
            its class. For a gate or another sum without a shortcut, and for a forward that could
            not be read, the reason names the file and the line.
    """

    def __init__(
        self, residuals: Iterable[Residual], not_taken: Iterable[tuple[str, str]] = ()
    ) -> None:
        super().__init__(residuals)
        self.not_taken = tuple(not_taken)

    def __repr__(self) -> str:
        lines = [repr(residual) for residual in self]
        lines += [f"not taken: {name} ({why})" for name, why in self.not_taken]
        return "[" + ",\n ".join(lines) + "]"


def find_residuals(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    select: Callable[[Residual], bool] | None = None,
) -> Residuals:
    """Return the residual blocks of ``model`` in the order of depth. The model is not changed.

    Args:
        model: Any module.
        example_inputs: What the model is called with: a tensor, a tuple, or a dict of keyword
            arguments. Needed for models whose blocks cannot be traced from their signature alone.
        select: A function of a ``Residual`` that returns whether it is included. It is called with
            all residuals, also those that are not taken by default. None includes those with
            ``Residual.default``.

    Returns:
        A list with one entry for each block. A block may have several branches, such as attention
        and MLP. Its attribute ``not_taken`` lists the other sums of the model, such as gates, and
        why they are not in the list.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``select`` is not callable.
        ValueError: The model cannot be called with ``example_inputs``.
    """
    check_model(model)
    if select is not None and not callable(select):
        raise TypeError(f"select has to be a function of a Residual, but got {select!r}")
    example = None if example_inputs is None else Example(model, example_inputs)
    found = survey(model, example)
    chosen = [r for r in found.residuals if (select(r) if select else r.default)]
    return Residuals(chosen, reasons_not_taken(model, found, chosen))
