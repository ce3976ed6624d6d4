"""RUN: what stands in the ``forward`` slot of a block while stochastic depth is attached.

In training with p > 0 a site runs a generated forward that defers the block's branches and comes
back to :meth:`Site.join` for each; in evaluation, or with p = 0, it runs the block's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from torchdrop.finding.residual_sums import read_residual_sums
from torchdrop.finding.row_layout import RowLayout
from torchdrop.rows.in_graph import (
    rows_in_graph,
    run_uncompiled,
    size_in_graph,
    spread_in_graph,
    take_in_graph,
    zeros_for,
)
from torchdrop.rows.saved_rows import regather_in_backward, saved_by_producer
from torchdrop.rows.take_and_add import add_rows, add_whole, skip_and_rows, take
from torchdrop.running.block_site import (
    BlockSite,
    drop_spare_row,
    precision_of,
    to_device_of,
    unchanged,
)
from torchdrop.running.branch_state import (
    MASK_REQUESTED,
    MIN_ELEMENTS_TO_SKIP,
    BranchState,
    Settings,
)
from torchdrop.running.program import MismatchError, Program, call_signature
from torchdrop.running.rewrite import rewrite
from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.traced_functions import pad_like
from torchdrop.tracing.untraceable import UntraceableError
from torchdrop.tracing.watched_attributes import same

__all__ = ["SplitSite"]

# How many different settings of its block (attributes, constant arguments) a site reads.
_READINGS = 16

# How many kinds of calls (shapes, dtypes) are remembered of a block whose reading depends on them.
_KINDS_OF_CALLS = 1024


class SplitSite(BlockSite):
    """What stands in the ``forward`` slot of a block whose branches are computed one by one."""

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        branches: list[BranchState],
        train: Program,
        evaluate: Program | None,
        orders: Sequence[int],
        look_through: Sequence[str],
        items: Mapping[str, Sequence[Any]],
    ) -> None:
        super().__init__(module, settings, branches, look_through)
        # The block as it was read first, and with other attributes or constants than then. Branch
        # number k of all of them together is branch k modulo the number of branches.
        self.train = [train]
        self.evaluate = [] if evaluate is None else [evaluate]
        # Which of the additions of the forward the branches are.
        self.orders = list(orders)
        self.items = dict(items)  # what the children return that are not part of it
        leading = list(self.__signature__.parameters)[: len(train.tensors)]
        self._plain = train.tensors if leading == train.tensors else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward that this moment calls for."""
        module = self.module
        if self.active:
            if module.training or self.settings.meter is not None:
                return self._run(self.train, True, args, kwargs)
            if self.evaluate:
                return self._run(self.evaluate, False, args, kwargs)
        return type(module).forward(module, *args, **kwargs)

    def _run(
        self, programs: list[Program], training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the program that stands for this call; read the block again where none does."""
        compiling = torch.compiler.is_compiling()
        # Tensors alone, one after the other: nothing to bind, and no cache among them.
        plain = not kwargs and all(isinstance(a, Tensor) for a in args)
        if not plain and self.settings.meter is None and not compiling:
            self._check_caches((*args, *kwargs.values()), training)
        mismatch: MismatchError | None = None
        for program in programs:
            try:
                program.check_attributes(self.module)
                tensors: Sequence[Any] = args
                if not plain or len(args) != len(program.tensors) or program.tensors != self._plain:
                    tensors = program.bind(self.__signature__, args, kwargs)
                program.check_decisions(tensors)
                break
            except MismatchError as found:
                mismatch = mismatch or found
        else:
            assert mismatch is not None
            program = self._read_again(programs, training, args, kwargs, mismatch)
            tensors = program.bind(self.__signature__, args, kwargs)
        if compiling:  # a graph cannot be left in the middle of a try
            return program.forward.function(self.module, self, *tensors)
        try:
            return program.forward.function(self.module, self, *tensors)
        except MismatchError as found:  # a child returned other things than when it was read
            program = self._read_again(programs, training, args, kwargs, found, use_items=False)
            tensors = program.bind(self.__signature__, args, kwargs)
            return program.forward.function(self.module, self, *tensors)

    def _read_again(
        self,
        programs: list[Program],
        training: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mismatch: MismatchError,
        use_items: bool = True,
    ) -> Program:
        """Read the block once more, in the call that happens now."""
        name = self.branches[0].block
        if any(isinstance(a, fx.Proxy) for a in (*args, *kwargs.values())):
            raise RuntimeError(
                f"torch.fx cannot trace {name} while stochastic depth acts on it; trace it in "
                f"evaluation (with scale='train'), or before torchdrop.add_stochastic_depth"
            )
        what = f"{name} was read with {mismatch.known}, but is called with {mismatch.given}"
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{what}; run the model once like this before it is compiled")
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        module = self.module
        items = {module.get_submodule(path): found for path, found in self.items.items()}
        try:
            block = trace_block(
                module,
                training=training,
                arguments=bound.arguments,
                batch_dim=self.branches[0].dim,
                look_through={module.get_submodule(path) for path in self.look_through},
                outputs=items if use_items else None,
            )
        except UntraceableError as error:
            raise RuntimeError(f"{what}, and so it cannot be read: {error}") from None
        known = [branch.row_layouts for branch in self.branches if branch.row_layouts is not None]
        entries = read_residual_sums(block, known, self.branches[0].dim)
        if len(entries) <= max(self.orders):
            raise RuntimeError(
                f"{what}, and so it does not add the same branches; give add_stochastic_depth "
                f"example_inputs, so that it is read as it is called, or leave it out with select="
            )
        splits = [
            (
                entries[order].split,
                "mask" if branch.reason == MASK_REQUESTED else entries[order].action,
            )
            for order, branch in zip(self.orders, self.branches, strict=True)
        ]
        for number, program in enumerate([*programs, None]):
            found = rewrite(block, splits, name, number * len(self.branches))
            if program is None and len(programs) >= _READINGS:
                raise RuntimeError(
                    f"{what}, and it was called in {_READINGS} different ways before; leave the "
                    f"block out with select=, or pass what changes as a tensor"
                )
            if program is None:
                programs.append(found)
            elif program.is_like(found):
                found = program  # as it was, for calls of one more kind
            else:
                continue
            break
        if found.seen is not None:
            if len(found.seen) >= _KINDS_OF_CALLS:
                found.seen.clear()
            found.seen.add(call_signature(found.bind(self.__signature__, args, kwargs)))
        return found

    @staticmethod
    def expect(found: Any, expected: Any) -> None:
        """Refuse to go on where a child returns something else than when it was read."""
        if found is not expected and (isinstance(expected, Tensor) or not same(expected, found)):
            raise MismatchError("what a child of it returned", "other things that it returns")

    def through(self, value: Any, path: str, args: Any, kwargs: Any, rest: Any) -> Any:
        """Run the forward hooks of a child whose forward is part of the block's own.

        Of what the child was called with, that is None which belongs to a branch.
        """
        child = self.module.get_submodule(path)
        if child._backward_hooks or child._backward_pre_hooks:
            raise RuntimeError(
                f"{path} has backward hooks, but stochastic depth runs its parts separately; "
                f"put the hooks on its children, or leave {self.branches[0].block} out with select="
            )
        for number, before in child._forward_pre_hooks.items():
            named = number in child._forward_pre_hooks_with_kwargs
            if (before(child, args, kwargs) if named else before(child, args)) is not None:
                raise RuntimeError(
                    f"a forward pre-hook changes what {path} is called with, but stochastic depth "
                    f"runs its parts separately; leave {self.branches[0].block} out with select="
                )
        for number, after in child._forward_hooks.items():
            named = number in child._forward_hooks_with_kwargs
            out = (value, *rest) if rest else value
            new = after(child, args, kwargs, out) if named else after(child, args, out)
            if new is not None:
                value = new[0] if rest else new
        return value

    def _branch(self, k: int) -> BranchState:
        return self.branches[k % len(self.branches)]

    def _compute(self, programs: list[Program], k: int, inputs: Sequence[Any]) -> Any:
        program = programs[k // len(self.branches)]
        return program.branches[k].function(self.module, self, *inputs)

    def join(self, k: int, skip: Tensor, *inputs: Any) -> Tensor:
        """``skip`` plus branch ``k`` of ``inputs``, computed on the rows that are kept."""
        branch, settings = self._branch(k), self.settings
        if torch.compiler.is_compiling() and self.module.training and settings.mode == "row":
            return self._join_in_graph(k, skip, inputs)
        if settings.meter is not None:
            before = settings.meter()
            version = _version(skip)
            out = self._compute(self.train, k, inputs)
            _check_apart(branch, skip, version, out)
            branch.share = (branch.share or 0.0) + settings.meter() - before
            return add_whole(skip, out, branch.gain, branch_first=branch.branch_first)
        if self.evaluate and not self.module.training:
            return self._evaluated(branch, skip, lambda: self._compute(self.evaluate, k, inputs))
        if self._meets_ranks(branch) or (branch.elementwise and self._too_small(branch, skip)):
            return self.mask(k, skip, self._compute(self.train, k, inputs))
        rows, kept = self._draw(branch, skip)
        if rows is False:
            return self._dropped(branch, skip, inputs, self._dtype_with(k, skip, inputs))
        gain = branch.gain_in_training()  # now: what runs in the branch may set another rate
        if rows is True:
            version = None if branch.dtypes else _version(skip)
            out = self._compute(self.train, k, inputs)
            if not branch.dtypes:  # the first time
                _check_apart(branch, skip, version, out)
            first, written = branch.branch_first, branch.writes_skip
            total = add_whole(skip, out, gain, inplace=written, branch_first=first)
        else:
            total = self._on_rows(k, skip, inputs, rows[:kept], gain)
        branch.dtypes[precision_of(skip)] = total.dtype
        return total

    def padded(self, k: int, dim: int, skip: Tensor, *inputs: Any) -> Tensor:
        """``skip`` with zeros on ``dim`` up to the size of branch ``k`` of ``inputs``."""
        branch = self._branch(k)
        if k not in branch.sizes:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"how many channels {branch.name} has is not known yet; give "
                    f"add_stochastic_depth example_inputs, or run the model once before it is "
                    f"compiled"
                )
            programs = self.train if self.module.training or not self.evaluate else self.evaluate
            inner = [self.module.get_submodule(path) for path in branch.inner]
            # this is no part of the work that is measured
            apart = nullcontext() if self.settings.meter is None else _disable_current_modes()
            with torch.no_grad(), unchanged(inner, skip.device), apart:
                branch.sizes[k] = self._compute(programs, k, inputs).shape[dim]
        return pad_like(skip, branch.sizes[k], dim)

    def _on_rows(
        self, k: int, skip: Tensor, inputs: Sequence[Any], rows: Tensor, gain: float
    ) -> Tensor:
        """``skip`` plus branch ``k`` on ``rows``, some but not all of the batch."""
        branch = self._branch(k)
        dim = branch.dim
        batch = skip.shape[dim]
        computed = self._rows_to_compute(branch, rows, skip, dim)
        on_device = to_device_of(computed, skip)
        program = self.train[k // len(self.branches)]
        known = program.row_layouts[k]
        taking = partial(take, rows=on_device)
        whole, taken = skip, None
        cut: list[Any] = []
        again: list[tuple[Tensor, Tensor]] = []
        for value, how in zip(inputs, known or [RowLayout(dim, 1)] * len(inputs), strict=True):
            if value is skip and how == (dim, 1) and not branch.writes_skip:
                whole, some = skip_and_rows(skip, on_device, dim)
            else:
                some = self._cut(branch, value, taking, how, batch, known is not None)
            cut.append(some)
            if value is skip:
                taken = some
            if how == (dim, 1) and some is not value and saved_by_producer(value):
                again.append((some, value))
        version = _version(taken)
        if again:
            with regather_in_backward(again, on_device, dim):
                out = self._compute(self.train, k, cut)
        else:
            out = self._compute(self.train, k, cut)
        if _version(taken) != version:
            raise _writes_into_its_input(branch)
        if computed is not rows:
            out, on_device = drop_spare_row(out, computed, rows, dim)
        written, reuses_skip = branch.writes_skip, k in program.reuses_skip and taken is not skip
        return add_rows(whole, out, on_device, gain, dim, inplace=written, reuses_skip=reuses_skip)

    def _join_in_graph(self, k: int, skip: Tensor, inputs: Sequence[Any]) -> Tensor:
        """The same in a graph, in plain operations, for a number of rows fixed by the rate."""
        branch = self._branch(k)
        dim, batch = branch.dim, skip.shape[branch.dim]
        if branch.always is False:
            unused = self._unused(branch, skip, inputs)
            if branch.writes_skip:
                return skip.add_(zeros_for(unused)) if unused else skip
            return skip + zeros_for(unused) if unused else skip.clone()
        # The number of rows that are drawn one by one is bounded by the batch alone.
        bounded = branch.always is None and self.settings.sampling != "independent"
        if not bounded or self._meets_ranks(branch):
            return self.mask(k, skip, self._compute(self.train, k, inputs))
        size = size_in_graph(branch.number, batch, 2)  # one row might be too few for BatchNorm
        drawn = rows_in_graph(branch.number, batch, size, skip)
        known = self.train[k // len(self.branches)].row_layouts[k]
        taking = partial(take_in_graph, drawn=drawn)
        cut = [
            self._cut(branch, value, taking, how, batch, known is not None)
            for value, how in zip(inputs, known or [RowLayout(dim, 1)] * len(inputs), strict=True)
        ]
        out = _weighted(self._compute(self.train, k, cut), drawn.weights, dim)
        out = spread_in_graph(out, drawn, dim)
        return skip.add_(out) if branch.writes_skip else skip + out

    def _mask_in_graph(self, k: int, skip: Tensor, out: Tensor) -> Tensor:
        branch = self._branch(k)
        batch = skip.shape[branch.dim]
        if branch.always is None:
            drawn = rows_in_graph(branch.number, batch, batch, skip)
            out = _weighted(out, drawn.weights.index_select(0, drawn.places), branch.dim)
        elif branch.always:
            out = out * branch.gain if branch.gain != 1.0 else out
        else:
            out = out * 0.0 if branch.writes_skip else zeros_for([out])
        return skip.add_(out) if branch.writes_skip else skip + out

    def mask(self, k: int, skip: Tensor, out: Tensor) -> Tensor:
        """``skip`` plus ``out``, branch ``k`` computed in full, where it is kept."""
        branch = self._branch(k)
        if torch.compiler.is_compiling() and self.module.training and self.settings.mode == "row":
            return self._mask_in_graph(k, skip, out)
        if self.settings.meter is not None:
            return add_whole(skip, out, branch.gain, branch_first=branch.branch_first)
        if self.evaluate and not self.module.training:
            return self._evaluated(branch, skip, lambda: out)
        if out.shape != skip.shape:
            _check_shapes(branch, skip, out)
        self._meets_ranks(branch)
        rows, kept = self._draw(branch, skip)
        if rows is False:
            return self._dropped(branch, skip, (out,), torch.promote_types(skip.dtype, out.dtype))
        if rows is not True:
            if out.dim() < skip.dim() or out.shape[branch.dim] != skip.shape[branch.dim]:
                out = out.expand(skip.shape)  # one row that stood for all
            # filled, not multiplied: an infinity in a dropped row must not become NaN
            out = out.index_fill(branch.dim, to_device_of(rows[kept:], out), 0)
        gain, first = branch.gain_in_training(), branch.branch_first
        return add_whole(skip, out, gain, inplace=branch.writes_skip, branch_first=first)

    @staticmethod
    def _too_small(branch: BranchState, skip: Tensor) -> bool:
        """Whether ``branch``, which has no matrices, takes longer on some rows than on all."""
        small = branch.p < 1.0 and 0.0 < branch.p * skip.numel() < MIN_ELEMENTS_TO_SKIP
        branch.action = "mask" if small else "skip"
        return small

    @staticmethod
    def _evaluated(branch: BranchState, skip: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """The paper's rule in evaluation: every branch, times the probability of keeping it."""
        if branch.p == 1.0:
            return skip if branch.writes_skip else skip.clone()
        return add_whole(skip, run(), branch.gain * (1.0 - branch.p), inplace=branch.writes_skip)

    def _dtype_with(self, k: int, skip: Tensor, inputs: Sequence[Any]) -> torch.dtype:
        """The dtype that the sum would have: the same whether the branch is dropped or not."""
        run = partial(self._compute, self.train, k, inputs)
        return self._dtype_of(self._branch(k), skip, inputs, run)


def _weighted(out: Tensor, weights: Tensor, dim: int) -> Tensor:
    """``out`` times a weight for each row; zero, also where ``out`` is not finite, for weight 0."""
    shape = [1] * out.dim()
    shape[dim] = -1
    weights = weights.view(shape)
    # the product in the precision of the weights: 1/0.9 in bfloat16 would be 1.109375
    return torch.where(weights != 0.0, out * weights, 0.0).to(out.dtype)


def _version(x: Any) -> int | None:
    """How often ``x`` was written into, where that is known."""
    if x is None or x.is_inference():
        return None
    version: int = x._version
    return version


def _check_apart(branch: BranchState, skip: Tensor, version: int | None, out: Tensor) -> None:
    """Raise where a branch, run for all rows, does what it could not do for some or none."""
    if _version(skip) != version:
        raise _writes_into_its_input(branch)
    _check_shapes(branch, skip, out)


def _writes_into_its_input(branch: BranchState) -> Exception:
    return RuntimeError(
        f"the branch {branch.name} writes into its input, which the skip uses, too; "
        f"use compute='mask', or leave the block out with select="
    )


def _check_shapes(branch: BranchState, skip: Tensor, out: Tensor) -> None:
    """Raise where the sum would not have the shape of the skip, as it has where it is dropped."""
    try:
        out.expand(skip.shape)
    except RuntimeError:
        raise ValueError(
            f"the branch {branch.name} of shape {tuple(out.shape)} makes its skip larger, of shape "
            f"{tuple(skip.shape)}: where it is dropped the block would return another shape; "
            f"leave the block out with select=, or expand the skip before the sum"
        ) from None


run_uncompiled(
    __name__,
    *(
        f"torchdrop.{name}"
        for name in (
            "rows.collectives",
            "running.program",
            "rows.saved_rows",
            "rows.take_and_add",
            "rows.sampling",
            "rows.shared_numbers",
            "running.branch_state",
        )
    ),
)
