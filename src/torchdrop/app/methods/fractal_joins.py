"""Drop-path at the joins of a FractalNet."""

from __future__ import annotations

from torch import nn

from ..errors import UserError
from ..models import FractalNet
from .registry import Applied, Method, register


class JoinsApplied(Applied):
    """Drop-path at work on a FractalNet, whose joins count the inputs that they drop."""

    def __init__(self, net: FractalNet, p: float) -> None:
        net.p = p
        self.net = net
        self.asked = net.asked()

    def observed(self) -> float | None:
        """Return the mean share of the inputs of a join that were dropped since the last call."""
        return self.net.observed()


def _path_drop(model: nn.Module, p: float) -> Applied:
    if not isinstance(model, FractalNet):
        raise UserError(
            "path_drop drops inputs of the joins of a FractalNet; give --model fractalnet, or "
            "leave path_drop out of --methods"
        )
    return JoinsApplied(model, p)


register(
    Method(
        "path_drop",
        "drop-path of FractalNet, half of the samples local and half global (--model fractalnet)",
        _path_drop,
        p=0.15,
    )
)
