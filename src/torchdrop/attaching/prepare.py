"""Create the sites of a model from its residuals, without attaching them to the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchdrop.attaching.refusals import refuse_dropped_inside
from torchdrop.error_pages import see
from torchdrop.finding.example_calls import Example
from torchdrop.finding.existing_drops import is_unscaled
from torchdrop.finding.residual import Branch, Residual
from torchdrop.finding.residual_sums import read_residual_sums
from torchdrop.finding.split import Split, methods_with_sums
from torchdrop.internals import BatchNormBase
from torchdrop.running.block_site import BlockSite
from torchdrop.running.branch_state import (
    MASK_REQUESTED,
    MIN_ELEMENTS_TO_SKIP,
    BranchFacts,
    BranchState,
    Settings,
)
from torchdrop.running.forward_slot import runs_own_forward
from torchdrop.running.program import Program
from torchdrop.running.rewrite import rewrite
from torchdrop.running.split_site import SplitSite
from torchdrop.running.stream_readings import StreamReadings
from torchdrop.running.whole_site import WholeSite
from torchdrop.tracing.block_graph import BlockGraph, trace_block

__all__ = ["prepare_sites"]

_NEEDS_SECOND_ROW = (
    "BatchNorm needs more than one value a channel: a single kept row of a small map is computed "
    "together with a second row, whose result is discarded"
)

_NOT_SCALED = "kept rows are not divided by 1-p, as the model's own scale_by_keep=False asks"

_MASKED_IF_SMALL = (
    f"no weight matrices: masked where p times the number of elements is below "
    f"{MIN_ELEMENTS_TO_SKIP}, because that is faster"
)


def prepare_sites(
    model: nn.Module,
    chosen: Sequence[Residual],
    settings: Settings,
    compute: str,
    example: Example | None,
) -> list[BlockSite]:
    """Return a site for each forward that adds chosen branches, in the order of depth.

    Raises:
        ValueError: A branch cannot be dropped as asked.
    """
    names = [branch.name for residual in chosen for branch in residual.branches]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f"select took branches of one name more than once: {', '.join(twice)}")
    preparation = _Preparation(model, chosen, settings, compute, example)
    settings.blocks = len(preparation.indices)
    settings.masks_all = compute == "mask"
    by_owner: dict[str, list[tuple[Residual, Branch]]] = {}
    for residual in chosen:
        for branch in residual.branches:
            by_owner.setdefault(branch.source.owner, []).append((residual, branch))
    sites = [preparation.site(owner, members) for owner, members in by_owner.items()]
    return sorted(sites, key=BlockSite.depth)


class _Preparation:
    """What the sites of one model have in common."""

    def __init__(
        self,
        model: nn.Module,
        chosen: Sequence[Residual],
        settings: Settings,
        compute: str,
        example: Example | None,
    ) -> None:
        self.model = model
        self.example = example
        self.settings = settings
        self.compute = compute
        # The number of each block, and of each branch, in the order of depth.
        self.indices = {name: i for i, name in enumerate(dict.fromkeys(r.name for r in chosen))}
        branches = (branch for residual in chosen for branch in residual.branches)
        self.orders = {branch.name: i for i, branch in enumerate(branches)}

    def site(self, owner: str, members: Sequence[tuple[Residual, Branch]]) -> BlockSite:
        """Return the site of the module ``owner``, whose forward adds the branches ``members``."""
        module = self.model.get_submodule(owner)
        if not runs_own_forward(module):
            raise ValueError(
                f"the forward of {owner!r} is already replaced on the instance (by "
                f"{module.__dict__['forward']!r}); add stochastic depth before that is done"
                + see("already-attached")
            )
        block = members[0][1].source.graph
        if block is None:
            return self.whole_site(*members[0])
        return self.split_site(owner, block, members)

    def whole_site(self, residual: Residual, branch: Branch) -> WholeSite:
        """Return the site of a block that is dropped as a whole."""
        if self.compute == "mask":
            action, reason = "mask", MASK_REQUESTED
        else:
            action, reason = branch.action, branch.reason
        facts = self.facts(residual, branch, None, action)
        state = BranchState(facts, action, _full_reason(reason, facts, action))
        source = branch.source
        readings = StreamReadings(source.joined, source.changes) if source.joined else None
        assert source.whole_block is not None
        return WholeSite(residual.module, self.settings, state, source.whole_block, readings)

    def split_site(
        self, owner: str, block: BlockGraph, members: Sequence[tuple[Residual, Branch]]
    ) -> SplitSite:
        """Return the site of a block whose branches are dropped one by one."""
        entries: list[tuple[Residual, Branch, Split]] = []
        for residual, branch in members:
            assert branch.source.split is not None
            entries.append((residual, branch, branch.source.split))
        position = {node: i for i, node in enumerate(block.graph.nodes)}
        entries.sort(key=lambda entry: position[entry[2].add])
        for _, branch, split in entries:
            refuse_dropped_inside(owner, block, branch.name, split)
        splits: list[tuple[Split, str]] = []
        states: list[BranchState] = []
        for residual, branch, split in entries:
            action, reason = self.action_of(branch)
            splits.append((split, action))
            facts = self.facts(residual, branch, split, action)
            states.append(BranchState(facts, action, _full_reason(reason, facts, action)))
        return SplitSite(
            block.module,
            self.settings,
            states,
            rewrite(block, splits, owner or type(block.module).__name__),
            _rewrite_for_evaluation(block, splits) if self.settings.scale == "eval" else None,
            [split.order for split, _ in splits],
            block.inlined,
            block.items,
            methods_with_sums(split for split, _ in splits),
        )

    def action_of(self, branch: Branch) -> tuple[str, str]:
        """Return the action of a branch for the given ``compute``, and the reason."""
        if self.compute == "mask" and branch.action == "skip":
            return "mask", MASK_REQUESTED
        if self.compute == "skip" and branch.action == "mask":
            raise ValueError(
                f"compute='skip', but {branch.name} cannot be skipped: {branch.reason}; "
                f"use compute='auto', or leave it out with select=" + see("cannot-be-skipped")
            )
        return branch.action, branch.reason

    def is_unscaled(self, branch: Branch) -> bool:
        """Whether kept rows are not divided by 1 - p, because the model's own masks do not."""
        return self.settings.scale == "train" and is_unscaled(self.model, branch.masks)

    def facts(
        self, residual: Residual, branch: Branch, split: Split | None, action: str
    ) -> BranchFacts:
        """Return the facts about a branch; ``split`` is None if its block is dropped as a whole."""
        owner = self.model.get_submodule(branch.source.owner)
        called = [self.model.get_submodule(child) for child in branch.children]
        own = () if split is None else _own_tensors(split)
        weights = [p for top in called for p in top.parameters()]
        weights += [attrgetter(path)(owner) for path in own]
        buffers = [b for top in called for b in top.buffers()]
        norms = any(isinstance(m, BatchNormBase) for top in called for m in top.modules())
        skipped_by_row = (self.compute, self.settings.mode, action) == ("auto", "row", "skip")
        matrices = any(map(_is_matrix, (*weights, *buffers)))
        if residual.module is owner:
            path: str | None = ""
        else:
            path = _relative(residual.name, branch.source.owner)
        return BranchFacts(
            name=branch.name,
            block=residual.name,
            path=path,
            above=0 if path is not None else _levels(residual.name, branch.source.owner),
            index=self.indices[residual.name],
            order=self.orders[branch.name],
            shortcut=branch.shortcut,
            children=branch.children,
            masks=branch.masks,
            inherited=branch.p,
            gain=1.0 if split is None else split.branch_gain,
            writes_skip=split is not None and split.writes_skip,
            branch_first=split is not None and split.branch_first,
            has_batch_norm=norms,
            elementwise=skipped_by_row and split is not None and not norms and not matrices,
            convolves=any(map(_may_convolve, weights)),
            inner=tuple(_relative(child, branch.source.owner) or "" for child in branch.children),
            partly=split is not None and split.partly,
            own=own,
            dim=_batch_dim(branch, split),
            row_layouts=None if split is None else split.row_layouts,
            sampling=self.settings.sampling,
            scale="none" if self.is_unscaled(branch) else self.settings.scale,
            rows_per_sample=self.rows_per_sample(branch, _batch_dim(branch, split)),
            samples_given=self.settings.rows_per_sample is not None,
        )

    def rows_per_sample(self, branch: Branch, dim: int) -> int:
        """Return how many rows each sample has in a branch: as given, or as the example shows."""
        if self.settings.rows_per_sample is not None or self.settings.mode == "batch":
            return self.settings.rows_per_sample or 1
        return 1 if self.example is None else self.example.rows_per_sample(branch.source.owner, dim)


def _full_reason(reason: str, facts: BranchFacts, action: str) -> str:
    """Return what the plan prints about a branch: ``reason``, and remarks on its action."""
    reasons = [
        reason,
        _NEEDS_SECOND_ROW if facts.has_batch_norm and action in ("skip", "layer") else "",
        _MASKED_IF_SMALL if facts.elementwise else "",
        _NOT_SCALED if facts.scale == "none" else "",
    ]
    return "; ".join(filter(None, reasons))


def _own_tensors(split: Split) -> tuple[str, ...]:
    """Return the paths of the parameters and buffers that the block's own forward reads for it."""
    sources = (source for node in split.inside for source in (node, *node.all_input_nodes))
    return tuple(dict.fromkeys(str(s.target) for s in sources if s.op == "get_attr"))


def _is_matrix(tensor: Tensor) -> bool:
    """Whether ``tensor`` has, or may get, more than one dimension that is larger than 1."""
    return is_lazy(tensor) or tensor.numel() > max(tensor.shape, default=1)


def _may_convolve(weight: Tensor) -> bool:
    """Whether ``weight`` has, or may get, the shape of the weight of a convolution."""
    return is_lazy(weight) or (weight.dim() > 2 and _is_matrix(weight))


def _relative(name: str, owner: str) -> str | None:
    """Return the path of ``name`` from ``owner``; None if it is not inside ``owner``."""
    if name == owner or not owner:
        return "" if name == owner else name
    return name.removeprefix(f"{owner}.") if name.startswith(f"{owner}.") else None


def _levels(name: str, owner: str) -> int:
    """Return how many levels ``name`` is above ``owner``; 0 if it is not above it."""
    return owner.removeprefix(name).count(".") if owner.startswith(f"{name}.") else 0


def _batch_dim(branch: Branch, split: Split | None) -> int:
    """Return the batch dimension of the skip of a branch; 0 if it is not known."""
    if split is not None:
        return split.dim or 0
    whole_block = branch.source.whole_block
    return 0 if whole_block is None else whole_block.dim


def _rewrite_for_evaluation(block: BlockGraph, splits: Sequence[tuple[Split, str]]) -> Program:
    """Return the program of the block's forward in evaluation, where its dropout is off."""
    label = f"{type(block.module).__name__} in evaluation"
    module = block.module
    in_eval = trace_block(
        module,
        training=False,
        arguments=block.arguments,
        batch_dim=splits[0][0].dim or 0,
        inlined={module.get_submodule(path) for path in block.inlined},
        items={module.get_submodule(path): items for path, items in block.items.items()},
    )
    twins = [entry.split for entry in read_residual_sums(in_eval)]
    if len(twins) <= max(split.order for split, _ in splits):
        raise ValueError(
            f"scale='eval' scales branches in evaluation, but {label} does not add the same "
            f"branches as in training; use scale='train'" + see("cannot-be-skipped")
        )
    return rewrite(in_eval, [(twins[s.order], action) for s, action in splits], label)
