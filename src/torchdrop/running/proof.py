"""Test a block on a real call, before any of its rows is dropped.

The first call of each kind answers two questions. Does the generated forward return what the
block's own forward returns, if nothing is dropped? Does the output of a branch for a row depend on
other rows? The test has no side effects (:mod:`torchdrop.running.unseen`), and the random numbers
of the training are the same with and without it.
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from torchdrop.error_pages import see
from torchdrop.finding.residual import WholeBlock
from torchdrop.finding.row_layout import RowLayout, RowLayouts
from torchdrop.internals import (
    functorch_transforms_active,
    in_backward_pass,
    modifications_of,
    tree_flatten,
)
from torchdrop.rows.sampling import refuse_nested
from torchdrop.rows.take_and_add import add_whole, take
from torchdrop.running.branch_state import BranchState
from torchdrop.running.independence import TrialCall, difference, find_dependence
from torchdrop.running.lone_row import BatchNormInputs
from torchdrop.running.program import MismatchError
from torchdrop.running.unseen import unseen
from torchdrop.running.zero_parameters import zero_parameters_replaced
from torchdrop.tracing.call_arguments import flatten_arguments
from torchdrop.tracing.own_forward import own_forward
from torchdrop.tracing.random_states import RandomStates

if TYPE_CHECKING:
    from torchdrop.running.block_site import BlockSite
    from torchdrop.running.split_site import SplitSite
    from torchdrop.running.whole_site import WholeSite

__all__ = [
    "SplitProof",
    "Verdict",
    "kind_of_call",
    "prove_split",
    "prove_whole",
    "warn_of_masks",
    "whole_block_of",
    "why_impossible",
]

# The largest difference between the outputs of the generated and of the own forward, relative to
# the largest value, that counts as rounding: the generated forward may add in another order.
_ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Verdict:
    """The result of the test of one kind of call.

    Attributes:
        why_unusable: Why the generated forward cannot be used; empty if it can.
        whole: How the block is dropped as a whole then; None if its form does not allow that.
        out: What the block's own forward returned.
    """

    why_unusable: str = ""
    whole: WholeBlock | None = None
    out: Any = None


# A test on this many samples or more is also valid for larger batches.
_MANY_SAMPLES = 4


def kind_of_call(
    number: int, tensors: Sequence[Any], dim: int, rows_per_sample: int
) -> tuple[Any, ...]:
    """Return a key that is the same for two calls if the test of one is valid for the other.

    Args:
        number: The number of the program that runs, negative in evaluation.
        tensors: The tensors of the call.
        dim: The dimension that carries the batch.
        rows_per_sample: How many rows each sample has.
    """
    batch = None
    parts: list[Any] = [number, torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")]
    for t in tensors:
        refuse_nested(t)
        shape = t.shape
        size = shape[dim] if len(shape) > dim else None
        if batch is None:
            batch = size
        # What counts is whether the tensor has the rows of the batch and whether it holds few
        # samples, not its exact size. A sort of two rows, for example, may change nothing.
        samples = None if size is None else min(size // rows_per_sample, _MANY_SAMPLES)
        parts.append((t.dtype, t.device, len(shape), samples, size == 1, size == batch))
    return tuple(parts)


def why_impossible(site: BlockSite, tensors: Sequence[Any]) -> str:
    """Say why a block cannot be tested in this call; empty if it can."""
    if functorch_transforms_active():
        return "a transform of torch.func is active"
    if any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta for t in tensors):
        return "its arguments are not plain tensors with data"
    if torch.is_inference_mode_enabled():
        return "inference mode is active"
    if any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    modules = list(site.module.modules())[1:]
    parameters = list(site.module.parameters())
    if any(map(is_lazy, parameters)):
        return "its parameters have no shape yet"
    if any(type(p).__name__ == "DTensor" for p in parameters) or any(
        type(m).__name__.startswith(("FSDP", "FullySharded", "DistributedData")) for m in modules
    ):
        return "parameters of its layers are split over ranks"
    if any(p.is_meta for p in parameters):
        return "its parameters are not loaded"
    return ""


@contextmanager
def _isolated(site: BlockSite, devices: set[torch.device]) -> Iterator[None]:
    """Let the block of ``site`` run without side effects, and with the sites inside it paused."""
    from torchdrop.running.block_site import sites_of

    with ExitStack() as stack:
        for other in sites_of(site.module):
            if other is not site:
                other.pause()
                stack.callback(other.resume)
        stack.enter_context(unseen(site.module, devices=devices))
        stack.enter_context(zero_parameters_replaced(site.module))
        yield


def _cloned(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with copies of their tensors, one copy for each tensor."""
    copies: dict[int, Tensor] = {}

    def copied(path: str, value: Tensor) -> Tensor:
        if id(value) not in copies:
            copies[id(value)] = _copy(value)
        return copies[id(value)]

    return flatten_arguments(arguments, copied)[0]


def _copy(value: Tensor) -> Tensor:
    """Return a copy of ``value``, which requires a gradient if ``value`` does."""
    copy = value.detach()
    if value.requires_grad and torch.is_grad_enabled():
        copy.requires_grad_()
    return copy.clone()  # not a leaf, so that the block may write into it


def _values(out: Any) -> list[Tensor]:
    return [t.detach() for t in tree_flatten(out)[0] if isinstance(t, Tensor)]


def _detached(out: Any) -> Any:
    return flatten_arguments({"": out}, lambda path, value: value.detach())[0][""]


def _largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference between two outputs; 0 if all differences are rounding."""
    if len(one) != len(other):
        return float("inf")
    off = 0.0
    for a, b in zip(one, other, strict=True):
        found = difference(a, b)
        off = max(off, found if found > _ROUNDING.get(a.dtype, 0.0) else 0.0)
    return off


class SplitProof:
    """Computes the residual sums of a site while its generated forward is tested.

    It runs each branch on all rows, and tests whether the rows are independent.

    Args:
        site: The site.
        training: Whether the forward for training is tested. In evaluation no rows are dropped, so
            their independence does not matter.
    """

    def __init__(self, site: SplitSite, training: bool) -> None:
        self._site = site
        self._rows_matter = training and site.settings.mode == "row"

    def join(
        self, k: int, skip: Tensor, inputs: Sequence[Any], run: Callable[..., Tensor]
    ) -> Tensor:
        """Return ``skip`` plus branch ``k``, and mask the branch if its rows are not independent.

        Args:
            k: The number of the branch in the programs of the site.
            skip: The other term of the sum.
            inputs: The inputs of the branch.
            run: ``run(inputs)`` returns the output of the branch.
        """
        site = self._site
        branch = site.branches[k % len(site.branches)]
        facts = branch.facts
        values = [v.detach() if isinstance(v, Tensor) else v for v in inputs]
        copies = [_copy(v) if isinstance(v, Tensor) else v for v in inputs]
        versions = [modifications_of(c) for c in copies if isinstance(c, Tensor)]
        before = RandomStates([skip.device])
        with BatchNormInputs() as norms:
            out = run(copies)
        if facts.dim < skip.dim() > 1:
            branch.row_values = norms.for_one_row(skip, facts.dim, branch.row_values)
        if [modifications_of(c) for c in copies if isinstance(c, Tensor)] != versions:
            branch.mask("it writes into its input, which the shortcut also uses")
            before.restore()
            out = run(values)
        elif self._rows_matter and not branch.depends and facts.dim < skip.dim():
            known = site.train[k // len(site.branches)].row_layouts[k]
            layouts = known or [RowLayout(facts.dim, 1)] * len(values)
            batch = skip.shape[facts.dim]

            def cut(value: Any, number: int, rows: Tensor) -> Any:
                taking = partial(take, rows=rows)
                return site.cut(facts, value, taking, layouts[number], batch, known is not None)

            group = site.settings.rows_per_sample or 1
            randoms = before, RandomStates([skip.device])
            trial = TrialCall(run, cut, values, out, facts.dim, batch, group, randoms)
            _mask_if_dependent(trial, site, branch, facts.inner)
        return add_whole(
            skip, out, facts.gain, inplace=facts.writes_skip, branch_first=facts.branch_first
        )


def _mask_if_dependent(
    trial: TrialCall, site: BlockSite, branch: BranchState, inner: Sequence[str]
) -> None:
    """Mask ``branch`` from now on if its rows depend on each other in ``trial``.

    Args:
        trial: The branch as it is called.
        site: The site of its block.
        branch: Its state.
        inner: The paths of the modules that the branch calls; "" is the block itself.
    """
    if trial.batch % trial.group or trial.batch < 2 * trial.group:
        return  # at least two whole samples are needed
    found = find_dependence(trial)
    if found and (norms := _possible_norms(site, inner)):
        found = _find_dependence_with_norms_off(trial, norms, branch, found)
    if found:
        branch.mask(f"its rows depend on each other: {found}")


def _possible_norms(site: BlockSite, inner: Sequence[str]) -> list[torch.nn.Module]:
    """Return the modules of a branch that are in training and have buffers, as a norm has."""
    tops = [site.module.get_submodule(path) if path else site.module for path in inner]
    return [
        m
        for top in tops
        for m in top.modules()
        if m.training and any(b is not None for b in m.buffers(recurse=False))
    ]


def _find_dependence_with_norms_off(
    trial: TrialCall, norms: list[torch.nn.Module], branch: BranchState, found: str
) -> str:
    """Say how rows depend on each other while ``norms`` are in evaluation mode.

    The test treats every BatchNorm like this. If the rows do not depend on each other then, record
    in ``branch.normalises`` that the norms depend on the batch. If the norms write into no buffer,
    return ``found``, the result with the norms in training mode.
    """
    buffers = [b for m in norms for b in m.buffers(recurse=False)]
    values = [b.clone() for b in buffers]
    trial.randoms[0].restore()
    trial.run(list(trial.values))
    written = any(not torch.equal(b, v) for b, v in zip(buffers, values, strict=True))
    for module in norms:
        module.training = False
    try:
        trial.randoms[0].restore()
        out = trial.run(list(trial.values))
        again = find_dependence(replace(trial, out=out)) if written else found
    finally:
        for module in norms:
            module.training = True
    if not again:
        kinds = ", ".join(sorted({type(m).__name__ for m in norms}))
        branch.normalises = f"{kinds} depends on the batch in training, as BatchNorm does"
    return again


def prove_split(
    site: SplitSite,
    training: bool,
    arguments: dict[str, Any],
    forward: Callable[[dict[str, Any]], Any],
) -> Verdict:
    """Test the block of ``site`` on one call, and return what was found of the generated forward.

    Branches are masked if they write into their input, if their rows depend on each other, or if
    two equal calls of the block return different values.

    Args:
        site: The site.
        training: Whether the forward for training is tested, or that for evaluation.
        arguments: The arguments of the call, as ``{"args": ..., "kwargs": ...}``.
        forward: ``forward(arguments)`` runs the generated forward.

    Raises:
        MismatchError: The program does not fit the call.
    """
    module = site.module
    devices = {t.device for t in flatten_arguments(arguments)[1].values()}
    own = own_forward(module)
    verdict = Verdict()
    with _isolated(site, devices):
        before = RandomStates(devices)
        given = _cloned(arguments)
        try:
            out = own(module, *given["args"], **given["kwargs"])
        except Exception as error:  # the user's forward may need a hook, or an earlier call
            site.note_unproved(f"its own forward raises {type(error).__name__} if it is tested")
            return verdict
        wanted, verdict.out = _values(out), _detached(out)
        del out
        before.restore()
        site.proof = SplitProof(site, training)
        try:
            found = _values(forward(_cloned(arguments)))
        except MismatchError:
            raise
        except Exception as error:
            verdict.why_unusable = f"its generated forward raises {type(error).__name__}: {error}"
        else:
            off = _largest_difference(wanted, found)
            if off:
                verdict.why_unusable = f"the output of its generated forward differs by {off:.2g}"
        finally:
            site.proof = None
    if verdict.why_unusable and _differs_from_itself(site, devices, arguments):
        verdict.why_unusable = ""
        for branch in site.branches:
            branch.mask("two equal calls of the block return different values")
    if training and not verdict.why_unusable:
        site.note_proved()
    return verdict


def _differs_from_itself(
    site: BlockSite, devices: set[torch.device], arguments: dict[str, Any]
) -> bool:
    """Whether the block's own forward returns different values in two equal calls."""
    own = own_forward(site.module)
    outs = []
    for _ in range(2):
        with _isolated(site, devices):
            given = _cloned(arguments)
            outs.append(_values(own(site.module, *given["args"], **given["kwargs"])))
    return _largest_difference(*outs) > 0.0


def whole_block_of(
    site: BlockSite, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> WholeBlock | None:
    """Return how a block can be dropped as a whole in a call; None if its form does not allow it.

    The first tensor among the arguments has to be the shortcut. The output has to be a tensor of
    its shape, or a tuple in which such a tensor is the first item and the only tensor.
    """
    bound = site.__signature__.bind(*args, **kwargs)
    bound.apply_defaults()
    tensors = flatten_arguments(bound.arguments)[1]
    returned = {k.lstrip("."): v for k, v in flatten_arguments({"": out})[1].items()}
    if not tensors or len(returned) != 1:
        return None
    (sum_item, total), (path, x) = next(iter(returned.items())), next(iter(tensors.items()))
    dim = site.branches[0].facts.dim
    if total.shape != x.shape or x.dim() <= dim or sum_item not in ("", "0"):
        return None
    rows = x.shape[dim]
    layouts: RowLayouts = {
        name: RowLayout(dim, 1) if t.dim() > dim and t.shape[dim] == rows else None
        for name, t in tensors.items()
    }
    returns = flatten_arguments({"": out}, lambda path, value: None)[0][""]
    return WholeBlock(path, dim, layouts, sum_item, returns)


def prove_whole(site: WholeSite, bound: inspect.BoundArguments) -> None:
    """Test whether the rows of a block that is dropped as a whole depend on each other."""
    branch, block = site.branches[0], site.block
    tensors = flatten_arguments(bound.arguments)[1]
    facts, x = branch.facts, tensors[block.x]
    batch, group = x.shape[facts.dim], site.settings.rows_per_sample or 1
    paths = list(tensors)
    writes: set[str] = set()

    def run(values: list[Any]) -> Tensor:
        by_path = dict(zip(paths, values, strict=True))
        replaced = flatten_arguments(bound.arguments, lambda path, _: by_path[path])[0]
        given = _cloned(replaced)
        copies = flatten_arguments(given)[1]
        versions = {path: modifications_of(copy) for path, copy in copies.items()}
        call = inspect.BoundArguments(bound.signature, OrderedDict(given))
        out = site.sum_in(site.run_block(call))
        writes.update(p for p, copy in copies.items() if modifications_of(copy) != versions[p])
        branch.writes_input |= block.x in writes
        return out

    def cut(value: Any, number: int, rows: Tensor) -> Any:
        layout = block.row_layouts[paths[number]]
        return site.cut(facts, value, partial(take, rows=rows), layout, batch)

    devices = {t.device for t in tensors.values()}
    with _isolated(site, devices):
        before = RandomStates(devices)
        try:
            with BatchNormInputs() as norms:
                out = run(list(tensors.values()))
        except Exception as error:
            site.note_unproved(f"its own forward raises {type(error).__name__} if it is tested")
            return
        site.check_shape(x, out)
        others = writes - {block.x}
        if others:
            branch.mask(f"it writes into its argument {min(others)}")
        randoms = before, RandomStates(devices)
        if x.dim() > 1:
            branch.row_values = norms.for_one_row(x, facts.dim, branch.row_values)
        if site.settings.mode == "row" and not others:
            values = [t.detach() for t in tensors.values()]
            trial = TrialCall(run, cut, values, out, facts.dim, batch, group, randoms)
            _mask_if_dependent(trial, site, branch, ("",))
    site.note_proved()


def warn_of_masks(site: BlockSite) -> None:
    """Warn, once for each model, that the rows of a branch depend on each other."""
    found = next((b for b in site.branches if b.depends), None)
    if found is None or site.settings.warned_of_dependence or in_backward_pass():
        return
    site.settings.warned_of_dependence = True
    warnings.warn(
        f"{found.facts.name} is computed for all rows and masked: {found.depends}. print(plan) "
        f"lists every such branch. If the samples of a batch do not depend on each other in this "
        f"model, pass example_inputs, or batch_dim= if the batch is not on dimension "
        f"{found.facts.dim}; otherwise use compute='mask', or leave the block out with select="
        + see("rows-depend"),
        stacklevel=2,
    )
