"""Give parameters that are all zero other values while a block is tested.

Many recipes start a branch at zero: a LayerScale of 0, a gate, a last norm or layer with weight 0.
Its output is zero then, for whatever rows, and a test of it shows nothing. After the first step of
the optimizer its rows may depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torchdrop.internals import parameters_of

__all__ = ["zero_parameters_replaced"]

_SEED = 20160330  # any number: the values have to be the same in each test, and on each rank


@contextmanager
def zero_parameters_replaced(module: nn.Module) -> Iterator[None]:
    """Replace each parameter of ``module`` whose values are all zero, and put it back afterwards.

    The parameter itself is not written into: a graph of the user may have saved it.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    others: dict[int, nn.Parameter] = {}
    generator = torch.Generator().manual_seed(_SEED)
    try:
        for owner in module.modules():
            for name, parameter in parameters_of(owner).items():
                if parameter is None or not _is_zero(parameter):
                    continue
                if id(parameter) not in others:
                    values = _values_like(parameter, generator)
                    others[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
                replaced.append((owner, name, parameter))
                parameters_of(owner)[name] = others[id(parameter)]
        yield
    finally:
        for owner, name, parameter in replaced:
            parameters_of(owner)[name] = parameter


def _is_zero(parameter: Tensor) -> bool:
    """Whether a parameter holds numbers, and all of them are zero."""
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
        return False
    return parameter.numel() > 0 and not parameter.detach().any()


def _values_like(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Return values for ``parameter`` with which a layer neither vanishes nor explodes."""
    values = torch.rand(parameter.shape, generator=generator, device="cpu")
    if parameter.dim() > 1:
        values = (2 * values - 1) / math.sqrt(parameter[0].numel())
    else:
        values = 0.25 + values / 2
    return values.to(parameter.device, parameter.dtype)
