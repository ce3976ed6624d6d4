"""Right against masking by hand, or refused: what each model of composed_blocks.py is held to.

``hold`` adds stochastic depth to a model, trains it two steps, and compares outputs, gradients and
buffers with a second model, of classes of its own, whose branches are computed outside of torchdrop
and masked with the rows that the plan names.
"""

from __future__ import annotations

import itertools
import re
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from composed_blocks import Spec, built
from composed_reference import ByHand, Call, Rows, Subject, calls_of
from torch import Tensor, nn

import torchdrop

Decision = tuple[str, Rows]  # the action of a branch, and the rows that were kept
Dropped = dict[tuple[int, int | None], Decision]  # of blocks and branches, as in ByHand


class InvalidError(Exception):
    """The model does not run without torchdrop."""


@dataclass
class Verdict:
    """What became of one model.

    kind: "right", "refused" (an error of torchdrop when it was added), "refused in a call" (one
        in a training step), "wrong", "raw error" (any other error).
    text: the error, or what is wrong.
    actions: of each branch of the model, as the plan has it after the last step; "dense" for one
        that was not taken.
    reasons: those of the plan.
    """

    kind: str
    text: str = ""
    actions: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


@dataclass
class Taken:
    """One branch of the plan: of which block, its number (None if unknown), its name, its action.

    whole: whether the plan says that the block is dropped as a whole.
    inner: the path of the child whose residual it is; "" for one of the block itself.
    """

    block: int
    number: int | None
    name: str
    action: str
    whole: bool = False
    inner: str = ""


def read_plan(spec: Spec, plan: torchdrop.Plan, block: nn.Module) -> list[Taken]:
    """Return the branches of the plan.

    A branch is known by its children, whose names hold its number; one without children, by
    elimination.
    """
    with_children = {_number(f".{name}") for name, _ in block.named_children()}
    taken: list[Taken] = []
    beside: list[Any] = []
    for residual in plan.blocks:
        if not residual.name.startswith("blocks."):  # sums of blocks through which the model looks
            beside += residual.branches
            continue
        i = int(residual.name.split(".")[1])
        if residual.name != f"blocks.{i}":
            (branch,) = residual.branches
            taken.append(Taken(i, None, branch.name, branch.action, inner=residual.name))
            continue
        without = [k for k in range(len(spec.branches)) if k not in with_children]
        whole = any(branch.action == "layer" for branch in residual.branches)
        for branch in residual.branches:
            paths = [child for child in branch.children if child.startswith(f"blocks.{i}.")]
            numbers = {_number(child) for child in paths} - {None}
            number = None
            if len(numbers) < 2 and (numbers or without):
                number = numbers.pop() if numbers else without.pop(0)
            whole = whole or number is None
            taken.append(Taken(i, number, branch.name, branch.action, whole))
        found = [t.number for t in taken if t.block == i and not t.inner]
        assert whole or len(set(found)) == len(found), f"{residual.name}: a branch is taken twice"
    found_at = {(branch.block, branch.number) for branch in taken}
    places = [(i, k) for i in range(2) for k in range(len(spec.branches)) if k not in with_children]
    for (i, k), branch in zip((at for at in places if at not in found_at), beside, strict=False):
        taken.append(Taken(i, k, branch.name, branch.action))
    return taken


def _number(path: str) -> int | None:
    """Return the number of the branch to which a child belongs; None for one beside branches."""
    hit = re.search(r"\.[a-z]+(\d)_\d", path)
    return int(hit[1]) if hit else None


# ---------------------------------------------------------------------------------------------
# The law


def tolerance_of(spec: Spec) -> float:
    if spec.mode == "under autocast":
        return 3e-2  # the rows of a product in bfloat16 differ by a rounding
    pieces = {name for branch in spec.branches for name, _ in branch.pieces}
    return 1e-5 if "float32 inside" in pieces else 1e-9


def difference(mine: Tensor | None, theirs: Tensor | None, tolerance: float) -> str:
    """Return how ``mine`` differs from ``theirs``, or "" if it does not; None is all zeros."""
    if mine is None or theirs is None:
        other = mine if theirs is None else theirs
        return "" if other is None or not other.any() else f"one is None, the other {other.norm()}"
    if mine.shape != theirs.shape:
        return f"shape {tuple(mine.shape)} for {tuple(theirs.shape)}"
    off = (mine.double() - theirs.double()).abs().max().item() if mine.numel() else 0.0
    scale = 1.0 + theirs.double().abs().max().item() if mine.numel() else 1.0
    return "" if off <= tolerance * scale else f"differs by {off:.3g} of {scale:.3g}"


def _outputs(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def compare(
    subject: Subject,
    reference: Subject,
    call: Call,
    by_hand: Callable[[], list[ByHand]],
    tol: float,
) -> str:
    """Return what differs in one step of the model and of its reference, or "".

    Args:
        by_hand: Returns, after the call of the model, the references of which one has to hold.
    """
    mine = subject.prepare(call)
    torch.manual_seed(call.seed + 7)
    with call.modes():
        out = _outputs(subject.net(**mine))
    if out[0].requires_grad:
        _backward(out)
    said = ""
    before = [buffer.clone() for buffer in reference.net.buffers()]
    for way in by_hand():
        for buffer, value in zip(reference.net.buffers(), before, strict=True):
            buffer.copy_(value)
        differs = _compare_with(way, mine, out, subject, reference, call, tol)
        if not differs:
            return ""
        said = said or differs
    return said


def _backward(outputs: Sequence[Tensor]) -> None:
    sum((t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in outputs).backward()


def _compare_with(
    way: ByHand,
    mine: dict[str, Any],
    out: Sequence[Tensor],
    subject: Subject,
    reference: Subject,
    call: Call,
    tol: float,
) -> str:
    """Return how the reference differs from what the model gave, or ""."""
    theirs = reference.prepare(call)
    torch.manual_seed(call.seed + 7)
    with call.modes():
        expected = way(theirs)
    for i, (a, b) in enumerate(zip(out, expected, strict=True)):
        if said := difference(a, b, tol):
            return f"output {i} {said}"
    if out[0].requires_grad != expected[0].requires_grad:
        return f"the output {'has no' if expected[0].requires_grad else 'has a'} gradient"
    if not out[0].requires_grad:
        return ""
    _backward(expected)
    pairs = [(name, mine[name].grad, theirs[name].grad) for name in mine if _is_tensor(mine[name])]
    parameters = zip(subject.net.named_parameters(), reference.net.parameters(), strict=True)
    pairs += [(name, a.grad, b.grad) for (name, a), b in parameters]
    for name, a, b in pairs:
        if said := difference(a, b, tol * 10):
            return f"the gradient of {name} {said}"
    if not subject.spec.checkpoints:  # in which buffers are updated twice
        buffers = zip(subject.net.named_buffers(), reference.net.buffers(), strict=True)
        for (name, a), b in buffers:
            if said := difference(a, b, tol):
                return f"the buffer {name} {said}"
    return ""


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def hold(spec: Spec, example: bool) -> Verdict:
    """Return what becomes of a model of ``spec`` with stochastic depth."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = [stack.enter_context(built(spec)) for _ in range(3)]
        torch.manual_seed(1)
        dtype = torch.float32 if spec.mode == "under autocast" else torch.float64
        calls = calls_of(spec, dtype)
        subject, reference, dense = (Subject(spec, module, dtype) for module in modules)
        check_valid(spec, dense, reference, calls)
        state = dense.net.state_dict()
        for model in (subject, reference):
            model.net.load_state_dict(state)
        return _hold(spec, example, subject, reference, calls)


def check_valid(spec: Spec, dense: Subject, reference: Subject, calls: Sequence[Call]) -> None:
    """Raise unless the model runs on its own, and is its reference if nothing is dropped."""
    if spec.checkpoints.startswith("checkpointed") and spec.branches[0].sum == "x.add_(h)":
        # PyTorch raises in the backward pass, unless the block happens to save no tensor for it.
        raise InvalidError("the checkpointed block writes into its input, from which it recomputes")
    reference.net.load_state_dict(dense.net.state_dict())
    before = {name: value.clone() for name, value in dense.net.state_dict().items()}
    for call in calls:
        hand = ByHand(reference, len(call.x), 1.0)
        try:
            said = compare(dense, reference, call, lambda hand=hand: [hand], tolerance_of(spec))
        except RuntimeError as error:  # such as a tensor that was saved and is written into
            raise InvalidError(str(error)) from error
        assert not said, f"the reference is not the model: {said}"
    dense.net.load_state_dict(before)


def _hold(
    spec: Spec, example: bool, subject: Subject, reference: Subject, calls: Sequence[Call]
) -> Verdict:
    given = subject.prepare(calls[0])
    inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
    try:
        with torch.no_grad() if spec.mode == "added without grad" else nullcontext():
            plan = torchdrop.add_stochastic_depth(
                subject.net,
                spec.p,
                schedule="uniform",
                sampling=spec.sampling,
                example_inputs=inputs if example else None,
            )
    except Exception as error:
        return _failed(error, "refused")
    actions: list[str] = []

    def verdict(kind: str, text: str) -> Verdict:
        reasons = [b.reason for r in plan.blocks for b in r.branches if b.reason]
        return Verdict(kind, text, actions, reasons)

    steps = [(f"step {n}", call, spec.p) for n, call in enumerate(calls[1:], 1)]
    last = calls[1]
    for name, call, p in [*steps, ("p=1", last, 1.0), ("p=0", last, 0.0), ("eval", last, spec.p)]:
        plan.set_p([p] * len(plan.blocks))
        subject.net.train(name != "eval")
        reference.net.train(name != "eval")
        if spec.checkpoints:  # which update buffers twice, where the reference does once
            reference.net.load_state_dict(subject.net.state_dict())
        try:
            said = compare(
                subject,
                reference,
                call,
                lambda call=call, p=p, name=name: masked(
                    spec, plan, reference, call, 0.0 if name == "eval" else p, actions
                ),
                tolerance_of(spec),
            )
        except Exception as error:
            failed = _failed(error, "refused in a call")
            return verdict(failed.kind, f"{name}: {failed.text}")
        if said:
            return verdict("wrong", f"{name}: {said}")
    return verdict("right", "")


def orders_of(spec: Spec, plan: torchdrop.Plan) -> dict[str, Rows]:
    """Return the kept rows of branches in the order in which they are computed, if that matters.

    What is random in a branch is drawn in that order; a plan sorts them.
    """
    if not any("random" in name for branch in spec.branches for name, _ in branch.pieces):
        return {}
    last = {branch.facts.name: branch.counts.last for branch in plan._branches}
    return {
        name: torch.as_tensor(seen[0][: seen[1]]).tolist()
        for name, seen in last.items()
        if seen is not None and not isinstance(seen[0], bool)
    }


def masked(
    spec: Spec, plan: torchdrop.Plan, reference: Subject, call: Call, p: float, actions: list[str]
) -> list[ByHand]:
    """Return the references of the call that the model has just made, one of which has to hold.

    There are two for a block whose branches were kept in the same rows and of which none is
    skipped: a plan does not say of each kind of call whether the block was dropped as a whole.
    """
    batch = len(call.x)
    kept, orders = plan.last_kept(), orders_of(reference.spec, plan)
    taken = read_plan(spec, plan, reference.net.blocks[0])  # type: ignore[index]
    actions[:] = [branch.action for branch in taken]
    gain = 1.0 / (1.0 - p) if p < 1.0 else 1.0
    inner: dict[str, Decision] = {}
    ways_of_blocks = []
    for i in range(2):
        own = [branch for branch in taken if branch.block == i and not branch.inner]
        if not any(branch.whole for branch in own):
            actions += ["dense"] * (len(spec.branches) - len(own))
        found: list[tuple[Taken, Decision]] = []
        for branch in taken:
            if branch.block != i or p == 0.0 or (call.off and i == 1):
                continue
            rows = kept[branch.name].tolist()
            if branch.name in orders and set(orders[branch.name]) == set(rows):
                rows = orders[branch.name]
            assert all(0 <= row < batch for row in rows), f"{branch.name} kept {rows} of {batch}"
            if spec.sampling == "exact" or p == 1.0:
                off = abs(len(rows) - batch * (1.0 - p))
                assert off < 1.0, f"{branch.name} kept {len(rows)} of {batch}"
            if branch.inner:
                inner[branch.inner] = branch.action, rows
            else:
                found.append((branch, (branch.action, rows)))
        ways_of_blocks.append(_ways_of_block(i, found))
    ways = []
    for first, second in itertools.product(*ways_of_blocks):
        way = ByHand(reference, batch, gain)
        way.dropped, way.inner = {**first, **second}, inner
        ways.append(way)
    return ways


def _ways_of_block(i: int, found: Sequence[tuple[Taken, Decision]]) -> list[Dropped]:
    """Return what may have been dropped in block ``i``, the likeliest first."""
    if not found:
        return [{}]
    apart: Dropped = {(i, branch.number): decision for branch, decision in found}
    first = found[0][1]
    as_whole = all(set(rows) == set(first[1]) and action != "skip" for _, (action, rows) in found)
    ways = [{(i, None): first}] if as_whole else []
    if all(branch.number is not None for branch, _ in found):
        ways.insert(len(ways) if any(branch.whole for branch, _ in found) else 0, apart)
    assert ways, f"the branches {[branch.name for branch, _ in found]} cannot be told apart"
    return ways


def _failed(error: Exception, told: str) -> Verdict:
    """Return the verdict of an error: told by torchdrop, or raw."""
    frames = traceback.extract_tb(error.__traceback__)
    where = frames[-1].filename
    ours = (
        isinstance(error, ValueError | TypeError | RuntimeError)
        and re.search(r"torchdrop/\w+(/\w+)?\.py$", where.replace("\\", "/")) is not None
        and (frames[-1].line or "").startswith("raise")
    )
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, AssertionError) and "torchdrop" not in where:
        return Verdict("wrong", text)
    return Verdict(told if ours else "raw error", f"{text} [{where.rsplit('/', 1)[-1]}]")
