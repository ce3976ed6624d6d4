"""The site of a block that is dropped as a whole, because its branches cannot be separated.

``out = x + b / (1 - p) * (block(x) - x)``, and ``block`` is run only on the rows with b = 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
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
    """The object in the ``forward`` slot of a block that is dropped as a whole.

    Args:
        module: The block.
        settings: The settings that all branches of the model share.
        branch: The one branch, ``block(x) - x``.
        block: Which argument and which output of the block are x and the sum.
    """

    def __init__(
        self, module: nn.Module, settings: Settings, branch: BranchState, block: WholeBlock
    ) -> None:
        super().__init__(module, settings, [branch])
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on the kept rows if anything is dropped or scaled, else as it is."""
        module = self.module
        training = module.training
        scaled = self.settings.scale == "eval" and not training
        if self.meter is not None:
            return self._metered(self.meter, args, kwargs)
        if not self.active or not (training or scaled):
            return type(module).forward(module, *args, **kwargs)
        self._check_caches((*args, *kwargs.values()), training)
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        tensors = self._tensors_of(bound)
        x = tensors[self.block.x]
        branch = self.branches[0]
        rows: Any
        if scaled:
            rows, gain = branch.rate.p < 1.0, 1.0 - branch.rate.p
        else:
            rows, kept = self._draw(branch, x)
            rows = rows if isinstance(rows, bool) else rows[:kept]
            # read before the block runs: code in the block may set another rate
            gain = 0.0 if rows is False else branch.rate.gain_in_training()
        masked = branch.action == "mask" or self._runs_on_all_ranks(branch)
        if rows is False and not masked:
            out, total = self.block.returns, self._without_block(bound, x, tuple(tensors.values()))
        else:
            if masked or isinstance(rows, bool):
                out = self._run(bound)
                total = self._blended(x, self._sum_in(out), rows, gain)
            else:
                out, total = self._run_on(rows, bound, x, gain)
            branch.dtypes[precision_of(x)] = total.dtype
        if self._observers:
            self._report(0, x, total, rows)
        return self._returned(total, out)

    def _metered(
        self, meter: Callable[[], int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the block as it is, and add its FLOPs to the share of the branch."""
        branch, before = self.branches[0], meter()
        out = type(self.module).forward(self.module, *args, **kwargs)
        branch.share = (branch.share or 0.0) + meter() - before
        return out

    def _tensors_of(self, bound: inspect.BoundArguments) -> dict[str, Tensor]:
        """Return the tensors among the arguments.

        Raises:
            RuntimeError: One of them was not there when the block was read.
        """
        tensors = flatten_arguments(bound.arguments)[1]
        known = self.block.row_layouts
        if not set(tensors) <= set(known) or self.block.x not in tensors:
            raise RuntimeError(
                f"{self.branches[0].facts.name} is dropped as a whole and was read with the "
                f"tensors {', '.join(known)}, but is called with {', '.join(tensors)}; give "
                f"example_inputs that lead to such a call, or leave the block out with select="
            )
        return tensors

    def _without_block(
        self, bound: inspect.BoundArguments, x: Tensor, given: tuple[Tensor, ...]
    ) -> Tensor:
        """Return ``x`` alone, in the dtype that the sum would have."""
        branch = self.branches[0]
        dtype = self._dtype_of(branch, x, given, lambda: self._sum_in(self._run(bound)))
        return self._dropped(branch.facts, x, given, dtype)

    def _blended(self, x: Tensor, y: Tensor, rows: Any, gain: float) -> Tensor:
        """Return ``x + gain * (y - x)`` in the kept rows and ``x`` in the others."""
        if rows is not False and gain != 1.0:
            y = x + gain * (y - x)
        if rows is True:
            return y
        none = torch.empty(0, dtype=torch.long, device="cpu")
        dim = self.branches[0].facts.dim
        return torch.where(_mask_of(none if rows is False else rows, x, dim), y, x)

    def _run_on(
        self, rows: Tensor, bound: inspect.BoundArguments, x: Tensor, gain: float
    ) -> tuple[Any, Tensor]:
        """Return the output of the block for ``rows``, and the sum for all rows."""
        facts = self.branches[0].facts
        computed = self._rows_to_compute(facts, rows, x)
        on_device = to_device_of(computed, x)
        taking = partial(take, rows=on_device)
        some: dict[str, Tensor] = {}

        def cut(path: str, value: Tensor) -> Tensor:
            layout = self.block.row_layouts[path]
            some[path] = self._cut(facts, value, taking, layout, x.shape[facts.dim])
            return some[path]

        bound.arguments.update(flatten_arguments(bound.arguments, cut)[0])
        out = self._run(bound)
        added = self._sum_in(out) - some[self.block.x]
        if computed is not rows:
            added, on_device = drop_spare_row(added, computed, rows, facts.dim)
        return out, add_rows(x, added, on_device, gain, facts.dim)

    def _run(self, bound: inspect.BoundArguments) -> Any:
        """Run the block's own forward."""
        return type(self.module).forward(self.module, *bound.args, **bound.kwargs)

    def _sum_in(self, out: Any) -> Tensor:
        """Return the sum from the output of the block."""
        found: Tensor = out if self.block.sum_item == "" else out[int(self.block.sum_item)]
        return found

    def _returned(self, total: Tensor, out: Any) -> Any:
        """Return ``out``, an output of the block, with ``total`` as its sum."""
        if self.block.sum_item == "":
            return total
        place = int(self.block.sum_item)
        return type(out)([*out[:place], total, *out[place + 1 :]])


def _mask_of(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    """Return True in the slices ``rows`` of ``like`` along ``dim``, in a shape that broadcasts."""
    kept = torch.zeros(like.shape[dim], dtype=torch.bool, device="cpu")
    kept[rows] = True
    shape = [1] * like.dim()
    shape[dim] = -1
    return kept.to(like.device, non_blocking=True).view(shape)


run_uncompiled(__name__)
