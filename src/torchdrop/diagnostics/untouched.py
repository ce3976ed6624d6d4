"""Run a model, and leave it as it was: also where it updates statistics, counts, or raises."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from torchdrop.rows.shared_numbers import shared_numbers
from torchdrop.running.block_site import BlockSite, sites_of
from torchdrop.running.split_site import SplitSite

__all__ = ["Buffers", "untouched"]


class Buffers:
    """Copies of all buffers of a model, which stand in their place for a while.

    The buffers themselves are not written to, so that neither their values nor their versions
    change, and a backward pass that needs them still finds what it saved.
    """

    def __init__(self, model: nn.Module) -> None:
        copies: dict[int, Tensor] = {}
        self._places: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    copy = copies.setdefault(id(buffer), buffer.detach().clone())
                    self._places.append((module, name, buffer, copy))

    def reset(self) -> None:
        """Put the copies in place, with the values of the originals."""
        with torch.no_grad():
            for module, name, original, copy in self._places:
                module._buffers[name] = copy
                # whether it changed is not known: batch_norm updates without a new version
                copy.copy_(original)

    def restore(self) -> None:
        """Put the originals back."""
        for module, name, original, _ in self._places:
            module._buffers[name] = original

    def keep(self, wanted: Callable[[nn.Module], bool]) -> None:
        """Write what the copies hold into the originals, for the modules that are wanted."""
        with torch.no_grad():
            for module, name, original, copy in self._places:
                if wanted(module):
                    now = module._buffers[name]
                    original.copy_(copy if now is None else now)


@contextmanager
def untouched(model: nn.Module) -> Iterator[Buffers]:
    """Without gradients; afterwards all but the buffers that were kept is as it was before.

    That is: training flags, buffers (the very tensors), ``requires_grad`` of the parameters, what
    attached stochastic depth counts and remembers, and the global random numbers of Python, numpy
    and torch, on the CPU and on the devices of the model. Compiled parts run uncompiled.
    """
    modes = [(m, m.training) for m in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    buffers = Buffers(model)
    with ExitStack() as stack:
        stack.enter_context(_random_numbers(model))
        stack.enter_context(shared_numbers.alone())
        for site in sites_of(model):
            stack.callback(_remember(site))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            buffers.reset()
            with torch.no_grad():
                yield buffers
        finally:
            buffers.restore()
            for module, training in modes:
                module.training = training
            for parameter, requires_grad in wanted:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)


@contextmanager
def _random_numbers(model: nn.Module) -> Iterator[None]:
    used = {t.device for t in [*model.parameters(), *model.buffers()]}
    kinds = sorted({d.type for d in used} - {"cpu", "meta"})
    numpy = sys.modules.get("numpy")
    before = random.getstate()
    arrays = numpy.random.get_state() if numpy is not None else None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in kinds:
            indices = sorted(d.index for d in used if d.type == kind and d.index is not None)
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        try:
            yield
        finally:
            random.setstate(before)
            if numpy is not None and arrays is not None:
                numpy.random.set_state(arrays)


def _remember(site: BlockSite) -> Callable[[], None]:
    """What sets ``site`` back to the state of this moment."""
    branches = [(b, dict(b.__dict__), dict(b.dtypes)) for b in site.branches]
    programs = (site.train, site.evaluate) if isinstance(site, SplitSite) else ()
    before = [list(known) for known in programs]

    def restore() -> None:
        for branch, state, dtypes in branches:
            branch.__dict__.update(state)
            branch.dtypes.clear()
            branch.dtypes.update(dtypes)
        for known, then in zip(programs, before, strict=True):
            known[:] = then

    return restore
