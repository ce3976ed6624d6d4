"""The site of a block whose branches are dropped one by one.

In training with p > 0 it runs a generated forward, which calls :meth:`SplitSite.join` for each
residual sum instead of computing the branch; otherwise it runs the block's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchdrop.error_pages import see
from torchdrop.internals import (
    compiler_runs,
    disable_dispatch_modes,
    forward_hooks_of,
    forward_pre_hooks_of,
    functorch_transforms_active,
    has_backward_hooks,
)
from torchdrop.rows.in_graph import mark_uncompiled
from torchdrop.rows.take_and_add import add_whole
from torchdrop.running.block_site import (
    BlockSite,
    modifications,
    precision_of,
    sites_of,
    to_device_of,
)
from torchdrop.running.branch_state import (
    BranchFacts,
    BranchState,
    Settings,
)
from torchdrop.running.call_form import DIFFERS
from torchdrop.running.generation import only_fills_cache
from torchdrop.running.program import MismatchError, Program
from torchdrop.running.proof import (
    Verdict,
    kind_of_call,
    prove_split,
    warn_of_masks,
    whole_block_of,
    why_impossible,
)
from torchdrop.running.read_again import read_again
from torchdrop.running.residual_sum import (
    check_separable,
    check_shapes,
    choose_mask,
    sum_in_evaluation,
    sum_on_all_rows,
    sum_on_rows,
    sum_without_branch,
)
from torchdrop.running.sums_in_graph import join_in_graph, mask_in_graph
from torchdrop.running.usual_call import usual_call
from torchdrop.running.whole_site import WholeSite, run_whole, whole_site_of
from torchdrop.tracing.process_state import PROCESS_LOCK
from torchdrop.tracing.traced_functions import pad_like
from torchdrop.tracing.unchanged import unchanged
from torchdrop.tracing.watched_attributes import same

__all__ = ["SplitSite"]


class SplitSite(BlockSite):
    """The object in the ``forward`` slot of a block whose branches are dropped one by one.

    Args:
        module: The block.
        settings: The settings that all branches of the model share.
        branches: The branches that the block adds, in the order in which it adds them.
        train: The generated forward in training.
        evaluate: The one in evaluation; None unless branches are scaled there.
        orders: The position of each branch among the residual sums of the forward.
        inlined: The paths of the children whose forward is read as part of the block's own.
        items: What children returned, as in :attr:`BlockGraph.items`.
        methods: The methods, other than forward, in which the block adds branches.
    """

    # Runs a call in training that is like the last one that passed all checks.
    _usual: Callable[..., Any] | None = None

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        branches: list[BranchState],
        train: Program,
        evaluate: Program | None,
        orders: Sequence[int],
        inlined: Sequence[str],
        items: Mapping[str, Sequence[Any]],
        methods: Sequence[str],
    ) -> None:
        super().__init__(module, settings, branches, inlined, methods)
        # One program for each combination of attributes and constant arguments with which the block
        # was called. Branches are numbered through all programs: branch number k of a program is
        # self.branches[k % len(self.branches)].
        self.train = [train]
        self.evaluate = [] if evaluate is None else [evaluate]
        self.orders = list(orders)
        self.items = dict(items)
        self._calls = 0  # counted where there are several programs, to know which is old
        # Drops the block as a whole, in calls in which the generated forward differs from its own.
        self.whole: WholeSite | None = None
        # Why neither the generated forward nor dropping the whole block is right; None if one is.
        self._refuted: str | None = None
        leading = list(self.__signature__.parameters)[: len(train.tensors)]
        # The tensors of the first program, if they are the leading parameters in order, so that a
        # call with only positional tensors need not be bound; else None.
        self._positional_names = train.tensors if leading == train.tensors else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        # A compiler would compile anew for each new object, and not what is between the branches.
        if not torch.compiler.is_dynamo_compiling() and not compiler_runs():
            usual = self._usual
            if usual is not None and self.active and self.module.training:
                try:
                    out = usual(args, kwargs)
                except MismatchError as found:
                    run = partial(self._run_unlike, self.train, True, found=found)
                    return self.without_masks(run, args, kwargs)
                if out is not DIFFERS:
                    return out
        return super().__call__(*args, **kwargs)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a generated forward if anything may be dropped or scaled, else the block's own."""
        if self.active:
            if self.module.training or self.meter is not None:
                return self._run(self.train, True, args, kwargs)
            if self.evaluate:
                return self._run(self.evaluate, False, args, kwargs)
        return self.run_own(args, kwargs)

    def computes_sums(self) -> bool:
        """Whether a call now would run a generated forward, which reports its sums."""
        return self.active and bool(self.module.training or self.evaluate)

    def snapshot(self) -> dict[str, Any]:
        """Return what a forward pass may change of this site, for :meth:`restore`."""
        programs = list(self.train), list(self.evaluate)
        return {**super().snapshot(), "programs": programs, "whole": (self.whole, self._refuted)}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to the state in which :meth:`snapshot` was called."""
        super().restore(snapshot)
        self.train[:], self.evaluate[:] = snapshot["programs"]
        self._usual = None
        self.whole, self._refuted = snapshot["whole"]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_usual": None}

    def forget_proofs(self, number: int) -> None:
        """Remove the verdicts on program ``number``, which another program replaces."""
        super().forget_proofs(number)
        self._usual = None

    def for_copy(self, module: nn.Module) -> Self:
        """Return a site for ``module``, a replica of the block, that shares all state."""
        twin = super().for_copy(module)
        twin._usual = None  # it would keep the replica
        twin.whole = None if self.whole is None else self.whole.for_copy(module)
        return twin

    # Find the program of a call -------------------------------------------------------------

    def _run(
        self, programs: list[Program], training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the program that fits this call; trace the block again if none does."""
        compiling = torch.compiler.is_compiling()
        # Positional tensors only: there is nothing to bind, and no cache among them.
        plain = not kwargs and all(isinstance(a, Tensor) for a in args)
        # FLOPs are measured in evaluation and without gradients, and nothing is dropped: caches and
        # modes do not matter then.
        checks = not plain or self.settings.generates
        if (
            checks
            and self.meter is None
            and not compiling
            and only_fills_cache(self, args, kwargs, training)
        ):
            return self.run_own(args, kwargs)
        mismatch: MismatchError | None = None
        for program in programs:
            try:
                program.check_attributes(self.module)
                if program.asks and self.meter is None:
                    program.check_modes()
                tensors: Sequence[Any] = args
                positional = plain and len(args) == len(program.tensors)
                if not positional or program.tensors != self._positional_names:
                    tensors = program.bind(self.__signature__, args, kwargs)
                program.check_decisions(tensors)
                break
            except MismatchError as found:
                mismatch = mismatch or found
        else:
            assert mismatch is not None
            program = read_again(self, programs, training, args, kwargs, mismatch)
            tensors = program.bind(self.__signature__, args, kwargs)
        if len(programs) > 1 and not compiling:
            self._calls += 1
            program.last_used = self._calls
        if program.runs_own:
            return self.run_own(args, kwargs)
        if compiling:  # a graph cannot be interrupted inside a try
            if training and self.whole is not None:
                return self.whole.call(args, kwargs)
            if training and self._refuted is not None:
                raise _unlike_own_forward(self.branches[0].facts, self._refuted)
            return program.forward.function(self.module, self, *tensors)
        try:
            return self._run_program(programs, program, training, args, kwargs, tensors)
        except MismatchError as found:
            return self._run_unlike(programs, training, args, kwargs, found)

    def _run_unlike(
        self,
        programs: list[Program],
        training: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: MismatchError,
    ) -> Any:
        """Read the block again after a child returned other values than expected, and run it.

        Args:
            programs: The programs for training or for evaluation.
            training: Whether these are the programs for training.
            args: The positional arguments of the call.
            kwargs: Its keyword arguments.
            found: What differs.
        """
        program = read_again(self, programs, training, args, kwargs, found, use_items=False)
        tensors = program.bind(self.__signature__, args, kwargs)
        return self._run_program(programs, program, training, args, kwargs, tensors)

    def _run_program(
        self,
        programs: list[Program],
        program: Program,
        training: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[Any],
    ) -> Any:
        """Test this kind of call if it was not tested before, then run ``program``.

        If the test refuted it, drop the block as a whole, or raise if that is not possible. If the
        site only proves, return what the block's own forward returns.
        """
        kind = None
        if self.settings.verify and self.meter is None:
            number, facts = programs.index(program), self.branches[0].facts
            number = number if training else -1 - number  # negative in evaluation
            kind = kind_of_call(number, tensors, facts.dim, self.settings.rows_per_sample or 1)
            verdict = self.verdicts.get(kind)
            if verdict is None or self.only_proves:
                verdict = self._prove(kind, program, training, args, kwargs, tensors)
            if self.only_proves:
                # Sites inside this block were paused in the test; its own forward tests them.
                nested = any(site is not self for site in sites_of(self.module))
                return self.run_own(args, kwargs) if nested or verdict.out is None else verdict.out
            if verdict.why_unusable:
                if verdict.whole is None or not training:
                    raise _unlike_own_forward(self.branches[0].facts, verdict.why_unusable)
                return run_whole(self, verdict, args, kwargs)
        out = program.forward.function(self.module, self, *tensors)
        proved = kind is None or kind in self.verdicts
        if training and proved and not (self.is_watched() or functorch_transforms_active()):
            self._usual = usual_call(self, program, tensors, args, kwargs)
        return out

    # Prove a call ---------------------------------------------------------------------------

    def _prove(
        self,
        kind: Any,
        program: Program,
        training: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[Any],
    ) -> Verdict:
        """Test this kind of call, and remember what was found."""
        if any(self.runs_on_all_ranks(branch) for branch in self.branches):
            # Such a branch is masked, and running it in a test would wait for the other ranks. The
            # other branches of the block stay untested.
            return Verdict()
        why = why_impossible(self, tensors)
        if why:
            self.note_unproved(why)
            return Verdict()  # not remembered: the next call may be tested

        def forward(given: dict[str, Any]) -> Any:
            values = program.bind(self.__signature__, given["args"], given["kwargs"])
            return program.forward.function(self.module, self, *values)

        verdict = prove_split(self, training, {"args": args, "kwargs": kwargs}, forward)
        if verdict.why_unusable:
            verdict.whole = whole_block_of(self, args, kwargs, verdict.out)
        self.verdicts[kind] = Verdict(verdict.why_unusable, whole=verdict.whole)
        if verdict.why_unusable and training:  # a compiled call cannot be tested
            if verdict.whole is None:
                self._refuted = verdict.why_unusable
            else:
                whole_site_of(self, verdict)
        if not self.only_proves:
            warn_of_masks(self)
        return verdict

    # What a generated forward calls ---------------------------------------------------------

    @staticmethod
    def expect(found: Any, expected: Any) -> None:
        """Raise :class:`MismatchError` if a child returned something else than when it was read."""
        if found is not expected and (isinstance(expected, Tensor) or not same(expected, found)):
            raise MismatchError("certain values that a child returned", "others")

    def run_child_hooks(self, value: Any, path: str, args: Any, kwargs: Any, rest: Any) -> Any:
        """Run the forward hooks of a child whose forward is read as part of the block's own.

        The hooks get the arguments of the child, with None for each that belongs to a branch.
        """
        child = self.module.get_submodule(path)
        if has_backward_hooks(child):
            raise RuntimeError(
                f"{path} has backward hooks, but stochastic depth runs the modules in it one by "
                f"one; put the hooks on its children, or leave {self.branches[0].facts.block} out "
                f"with select=" + see("hooks")
            )
        for before, named in forward_pre_hooks_of(child):
            if (before(child, args, kwargs) if named else before(child, args)) is not None:
                raise RuntimeError(
                    f"a forward pre-hook changes the arguments of {path}, but stochastic depth "
                    f"runs the modules in it one by one; leave {self.branches[0].facts.block} out "
                    f"with select=" + see("hooks")
                )
        for after, named in forward_hooks_of(child):
            out = (value, *rest) if rest else value
            new = after(child, args, kwargs, out) if named else after(child, args, out)
            if new is not None:
                value = new[0] if rest else new
        return value

    def join(self, k: int, skip: Tensor, *inputs: Any) -> Tensor:
        """Return ``skip`` plus branch ``k`` of ``inputs``, computed on the kept rows only."""
        branch, settings = self.branch(k), self.settings
        if torch.compiler.is_compiling() and self.module.training and settings.mode == "row":
            return join_in_graph(self, k, skip, inputs)
        if self.meter is not None:
            return self._metered(k, skip, inputs)
        if self.proof is not None:
            programs = self.train if self.module.training or not self.evaluate else self.evaluate
            return self.proof.join(k, skip, inputs, partial(self.compute, programs, k))
        facts = branch.facts
        rows: Any = True
        if self.evaluate and not self.module.training:
            run = partial(self.compute, self.evaluate, k, inputs)
            total = sum_in_evaluation(branch, skip, run)
        elif (
            branch.depends
            or self.runs_on_all_ranks(branch)
            or (facts.elementwise and choose_mask(branch, skip))
        ):
            return self.mask(k, skip, self.compute(self.train, k, inputs))
        else:
            rows, kept = self._draw(branch, skip)
            if rows is False:
                total = sum_without_branch(self, k, skip, inputs)
            else:
                # read before the branch runs: code in the branch may set another rate
                gain = branch.rate.gain
                if rows is True:
                    total = sum_on_all_rows(self, k, skip, inputs, gain)
                else:
                    rows = rows[:kept]
                    total = sum_on_rows(self, k, skip, inputs, rows, gain)
                branch.dtypes[precision_of(skip)] = total.dtype
        if self.observers:
            self._report(k % len(self.branches), skip, total, rows)
        return total

    def mask(self, k: int, skip: Tensor, out: Tensor) -> Tensor:
        """Return ``skip`` plus ``out``, the output of branch ``k``, with zeros in dropped rows."""
        branch = self.branch(k)
        if torch.compiler.is_compiling() and self.module.training and self.settings.mode == "row":
            return mask_in_graph(self, k, skip, out)
        facts = branch.facts
        if self.meter is not None:
            return add_whole(skip, out, facts.gain, branch_first=facts.branch_first)
        if self.proof is not None:
            first, inplace = facts.branch_first, facts.writes_skip
            return add_whole(skip, out, facts.gain, inplace=inplace, branch_first=first)
        rows: Any = True
        if self.evaluate and not self.module.training:
            total = sum_in_evaluation(branch, skip, lambda: out)
        else:
            if out.shape != skip.shape:
                check_shapes(facts, skip, out)
            # The answer does not matter here: the call notes the reason for the plan, and raises if
            # a child is sharded.
            self.runs_on_all_ranks(branch)
            rows, kept = self._draw(branch, skip)
            if rows is False:
                dtype = torch.promote_types(skip.dtype, out.dtype)
                total = self.dropped(facts, skip, (out,), dtype)
            else:
                if rows is not True:
                    rows, dropped = rows[:kept], rows[kept:]
                    if out.dim() < skip.dim() or out.shape[facts.dim] != skip.shape[facts.dim]:
                        out = out.expand(skip.shape)  # one row that is broadcast to all
                    # filled, not multiplied: an infinity in a dropped row must not become NaN
                    out = out.index_fill(facts.dim, to_device_of(dropped, out), 0)
                gain, first = branch.rate.gain, facts.branch_first
                total = add_whole(skip, out, gain, inplace=facts.writes_skip, branch_first=first)
        if self.observers:
            self._report(k % len(self.branches), skip, total, rows)
        return total

    def padded(self, k: int, dim: int, skip: Tensor, *inputs: Any) -> Tensor:
        """Return ``skip`` with zeros on ``dim``, up to the size of branch ``k`` of ``inputs``.

        The first call runs the branch on all rows, without gradients, to learn that size.
        """
        branch = self.branch(k)
        if k not in branch.sizes:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"the number of channels of {branch.facts.name} is not known yet; give "
                    f"add_stochastic_depth example_inputs, or call the model once before compiling "
                    f"it" + see("compile-and-export")
                )
            programs = self.train if self.module.training or not self.evaluate else self.evaluate
            inner = [self.module.get_submodule(path) for path in branch.facts.inner]
            # The FLOPs of this run are not part of the measured work.
            unmetered = nullcontext() if self.meter is None else disable_dispatch_modes()
            restored = unchanged(*inner, devices=[skip.device])
            with torch.no_grad(), PROCESS_LOCK, restored, unmetered:
                branch.sizes[k] = self.compute(programs, k, inputs).shape[dim]
        return pad_like(skip, branch.sizes[k], dim)

    # Compute a sum --------------------------------------------------------------------------

    def branch(self, k: int) -> BranchState:
        """Return the branch with the number ``k`` in the programs."""
        return self.branches[k % len(self.branches)]

    def compute(self, programs: list[Program], k: int, inputs: Sequence[Any]) -> Any:
        """Run branch ``k`` on ``inputs``."""
        program = programs[k // len(self.branches)]
        return program.branches[k].function(self.module, self, *inputs)

    def _metered(self, k: int, skip: Tensor, inputs: Sequence[Any]) -> Tensor:
        """Return ``skip`` plus branch ``k`` on all rows, and add its FLOPs to its share."""
        branch, meter = self.branch(k), self.meter
        assert meter is not None
        before, version = meter(), modifications(skip)
        out = self.compute(self.train, k, inputs)
        if self.settings.verify:  # a proof will mask a branch that writes into its input
            check_shapes(branch.facts, skip, out)
        else:
            check_separable(branch.facts, skip, version, out)
        branch.share = (branch.share or 0.0) + meter() - before
        return add_whole(skip, out, branch.facts.gain, branch_first=branch.facts.branch_first)


def _unlike_own_forward(facts: BranchFacts, why: str) -> Exception:
    return RuntimeError(
        f"the forward that was generated for {facts.block} does not compute what its own forward "
        f"computes: {why}; leave the block out with select=, or wrap the whole "
        f"block in torchdrop.StochasticDepth" + see("another-function")
    )


mark_uncompiled(
    __name__,
    *(
        f"torchdrop.{name}"
        for name in (
            "internals.modules",
            "internals.surroundings",
            "internals.tensors",
            "rows.collectives",
            "running.program",
            "running.generation",
            "running.read_again",
            "running.residual_sum",
            "running.call_form",
            "running.decision",
            "running.usual_call",
            "running.usual_sum",
            "rows.saved_rows",
            "rows.take_and_add",
            "rows.sampling",
            "rows.shared_numbers",
            "running.branch_state",
        )
    ),
)
