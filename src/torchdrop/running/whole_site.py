"""RUN, for a block that cannot be split: its whole forward is the branch.

``out = x + b / (1 - p) * (block(x) - x)``, and ``block`` is run on the rows with b = 1 only.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchdrop.finding.residual import WholeBlock
from torchdrop.rows.in_graph import run_uncompiled
from torchdrop.rows.take_and_add import add_rows, take
from torchdrop.running.block_site import BlockSite, drop_spare_row, precision_of, to_device_of
from torchdrop.running.branch_state import BranchState, Settings
from torchdrop.tracing.call_arguments import flatten_arguments

__all__ = ["WholeSite"]


class WholeSite(BlockSite):
    """What stands in the ``forward`` slot of a block that is dropped as a whole."""

    def __init__(
        self, module: nn.Module, settings: Settings, branch: BranchState, layer: WholeBlock
    ) -> None:
        super().__init__(module, settings, [branch])
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on the rows that are kept."""
        module, settings, branch = self.module, self.settings, self.branches[0]
        training = module.training
        scaled = settings.scale == "eval" and not training
        if settings.meter is not None:
            before = settings.meter()
            out = type(module).forward(module, *args, **kwargs)
            branch.share = (branch.share or 0.0) + settings.meter() - before
            return out
        if not self.active or not (training or scaled):
            return type(module).forward(module, *args, **kwargs)
        self._check_caches((*args, *kwargs.values()), training)
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        tensors = flatten_arguments(bound.arguments)[1]
        if not set(tensors) <= set(self.layer.row_layouts) or self.layer.x not in tensors:
            raise RuntimeError(
                f"{branch.name} is dropped as a whole and was read with the tensors "
                f"{', '.join(self.layer.row_layouts)}, but is called with {', '.join(tensors)}; "
                f"give example_inputs like that, or leave the block out with select="
            )
        x = tensors[self.layer.x]
        rows, kept = (branch.p < 1.0, 0) if scaled else self._draw(branch, x)
        rows = rows if isinstance(rows, bool) else rows[:kept]
        whole = branch.action == "mask" or self._meets_ranks(branch)
        if rows is False and not whole:
            given = tuple(tensors.values())
            dtype = self._dtype_of(branch, x, given, lambda: self._sum_in(self._as_it_is(bound)))
            return self._returned(self._dropped(branch, x, given, dtype), self.layer.returns)
        gain = 0.0  # read before the block runs: what runs in it may set another rate
        if rows is not False:
            gain = 1.0 - branch.p if scaled else branch.gain_in_training()
        if whole or isinstance(rows, bool):
            out = type(module).forward(module, *args, **kwargs)
            total = self._blended(branch, x, self._sum_in(out), rows, gain)
        else:
            out, total = self._run_on(rows, bound, x, gain)
        branch.dtypes[precision_of(x)] = total.dtype
        return self._returned(total, out)

    @staticmethod
    def _blended(branch: BranchState, x: Tensor, y: Tensor, rows: Any, gain: float) -> Tensor:
        """``x + gain * (y - x)`` in the kept rows; ``y`` itself where that is what it comes to."""
        if rows is not False:
            y = y if gain == 1.0 else x + gain * (y - x)
        if rows is True:
            return y
        none = torch.empty(0, dtype=torch.long, device="cpu")
        return torch.where(_mask_of(none if rows is False else rows, x, branch.dim), y, x)

    def _run_on(
        self, rows: Tensor, bound: inspect.BoundArguments, x: Tensor, gain: float
    ) -> tuple[Any, Tensor]:
        """What the block returns for ``rows``, and the sum for all rows."""
        branch, dim = self.branches[0], self.branches[0].dim
        computed = self._rows_to_compute(branch, rows, x, dim)
        on_device = to_device_of(computed, x)
        taking = partial(take, rows=on_device)
        some: dict[str, Tensor] = {}

        def cut(path: str, value: Tensor) -> Tensor:
            some[path] = self._cut(
                branch, value, taking, self.layer.row_layouts[path], x.shape[dim]
            )
            return some[path]

        bound.arguments.update(flatten_arguments(bound.arguments, cut)[0])
        out = self._as_it_is(bound)
        added = self._sum_in(out) - some[self.layer.x]
        if computed is not rows:
            added, on_device = drop_spare_row(added, computed, rows, dim)
        return out, add_rows(x, added, on_device, gain, dim)

    def _as_it_is(self, bound: inspect.BoundArguments) -> Any:
        """What the block's own forward returns."""
        return type(self.module).forward(self.module, *bound.args, **bound.kwargs)

    def _sum_in(self, out: Any) -> Tensor:
        found: Tensor = out if self.layer.sum_item == "" else out[int(self.layer.sum_item)]
        return found

    def _returned(self, total: Tensor, out: Any) -> Any:
        """What the block returns, with ``total`` in the place of the sum."""
        if self.layer.sum_item == "":
            return total
        place = int(self.layer.sum_item)
        return type(out)([*out[:place], total, *out[place + 1 :]])


def _mask_of(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    """True in the slices ``rows`` of ``like`` along ``dim``, in a shape that broadcasts."""
    kept = torch.zeros(like.shape[dim], dtype=torch.bool, device="cpu")
    kept[rows] = True
    shape = [1] * like.dim()
    shape[dim] = -1
    return kept.to(like.device, non_blocking=True).view(shape)


run_uncompiled(__name__)
