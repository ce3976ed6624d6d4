"""The handle on what is attached: its rates, what it delivered, its table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchdrop import schedules
from torchdrop.attaching.rates import resolve_rates, set_rates
from torchdrop.checks import check_model
from torchdrop.finding.residual import Branch, Residual
from torchdrop.rows.shared_numbers import shared_numbers
from torchdrop.running.block_site import BlockSite, sites_of
from torchdrop.running.branch_state import BranchState
from torchdrop.text_table import text_table

__all__ = ["Plan", "get_plan", "paused"]

_UNREACHED = "example_inputs did not come through it: it is not dropped in a forward like that"


class Plan:
    """What :func:`add_stochastic_depth` put on a model; ``print(plan)`` shows it as a table.

    A plan holds no state of its own: rates and counts live with the blocks, so a deepcopy or a
    loaded copy of the model has a plan of its own, which :func:`get_plan` returns.
    """

    def __init__(self, model: nn.Module, sites: Sequence[BlockSite]) -> None:
        self._model = model
        self._sites = list(sites)

    @property
    def _branches(self) -> list[BranchState]:
        return [branch for site in self._sites for branch in site.branches]

    def _is_attached(self) -> bool:
        there = {id(site) for site in sites_of(self._model)}
        return all(id(site) in there for site in self._sites)

    def _check_attached(self) -> None:
        if not self._is_attached():
            raise ValueError(
                "this plan's stochastic depth was taken off again, all of it or in part (or its "
                "blocks were replaced by others), so that nothing follows it any more; "
                "torchdrop.get_plan(model) gives the plan of what is there now"
            )

    @property
    def blocks(self) -> list[Residual]:
        """The blocks, first to last, with the rates of this moment."""
        blocks: dict[str, Residual] = {}
        for site in self._sites:
            for state in site.branches:
                block = blocks.setdefault(state.block, Residual(state.block, site.module, []))
                if state.path is not None:  # else another of its sites is the block itself
                    block.module = site.module.get_submodule(state.path)
                block.branches.append(
                    Branch(
                        name=state.name,
                        shortcut=state.shortcut,
                        action=state.action,
                        reason=state.reason,
                        p=state.p,
                        children=state.children,
                        masks=state.masks,
                        share=state.share,
                    )
                )
        return list(blocks.values())

    def set_p(self, p: Any) -> None:
        """Change the drop probabilities, from the next forward pass on.

        With activation checkpointing call it when no backward pass is outstanding: that computes
        the blocks again, and would decide by the new rates.

        Args:
            p: As for :func:`add_stochastic_depth`: a float for the deepest block, a sequence, or a
                mapping, whose other blocks keep their rate; None restores the inherited rates.

        Raises:
            TypeError, ValueError: ``p`` is none of these, or what the plan is of was removed;
                every rate is then what it was.
        """
        self._check_attached()
        settings = self._sites[0].settings
        set_rates(self._sites, resolve_rates(p, self._branches, settings.blocks, settings.schedule))

    def observed(self) -> dict[str, float]:
        """The drop rate delivered since the last call, for each branch: dropped rows over rows.

        Of this process; a checkpoint's recompute is not counted. 0 for a branch whose rate is 0,
        which is not counted either; NaN for one through which no row has gone in training.

        Raises:
            ValueError: What the plan is of was removed, and nothing was delivered before that.
        """
        if not any(branch.rows_seen for branch in self._branches):
            self._check_attached()
        delivered = {}
        for branch in self._branches:
            if branch.rows_seen:
                delivered[branch.name] = branch.rows_dropped / branch.rows_seen
            else:
                delivered[branch.name] = 0.0 if branch.p == 0.0 else float("nan")
            branch.rows_seen = branch.rows_dropped = 0
        return delivered

    def last_kept(self) -> dict[str, Tensor]:
        """The indices of the rows that each branch kept in the latest training forward pass."""
        kept = {}
        for branch in self._branches:
            if branch.last is not None:
                rows, number = branch.last
                if isinstance(rows, bool):
                    kept[branch.name] = torch.arange(number)
                else:
                    kept[branch.name] = torch.as_tensor(rows[:number]).sort().values
        return kept

    def state_dict(self) -> dict[str, Any]:
        """The rates, and where batch mode's decisions are, which all ranks take alike.

        To be saved beside the model's own state_dict and, where a run has to go on bit for bit,
        the state of the generators (``torch.get_rng_state()``), from which all else is drawn.
        """
        return {
            "version": 1,
            "p": {branch.name: branch.p for branch in self._branches},
            "shared_numbers": shared_numbers.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            TypeError, ValueError: The branches are not those of this model, the version is
                unknown, or a value is none that it gives; all is then as it was.
        """
        self._check_attached()
        if not isinstance(state, Mapping) or "p" not in state or state.get("version") != 1:
            raise ValueError("expected what Plan.state_dict() returned, of version 1")
        names = [branch.name for branch in self._branches]
        if not isinstance(state["p"], Mapping):
            raise TypeError(f"the rates of a plan are a mapping, but got {state['p']!r}")
        if set(state["p"]) != set(names):
            odd = sorted(map(str, set(state["p"]) ^ set(names)))
            raise ValueError(
                f"these rates belong to another model: {', '.join(odd[:4])} "
                f"{'is' if len(odd) == 1 else 'are'} not in both"
            )
        rates = [schedules.check_rate(state["p"][name], f"p[{name!r}]") for name in names]
        shared = state.get("shared_numbers")
        if shared is not None:
            shared_numbers.load_state_dict(shared)
        set_rates(self._sites, rates)

    def __repr__(self) -> str:
        settings = self._sites[0].settings
        how = f"{settings.mode} mode"
        if settings.mode == "row":
            how += f", {settings.sampling} sampling"
        dims = sorted({branch.dim for branch in self._branches})
        if dims != [0]:
            how += f", batch on dimension {' or '.join(map(str, dims))}"
        blocks = self.blocks
        count = sum(len(block.branches) for block in blocks)
        title = (
            f"stochastic depth on {type(self._model).__name__}: {len(blocks)} blocks, "
            f"{count} branches; {how}, scale={settings.scale!r}"
        )
        rows = [("block", "branch", "shortcut", "p", "action", "FLOPs")]
        reasons: dict[str, None] = {}
        for block in blocks:
            for branch in block.branches:
                label = branch.name[len(block.name) + 1 :] or "-"
                action = branch.action
                unreached = settings.measured and branch.share is None
                for reason in (branch.reason, _UNREACHED if unreached else ""):
                    if reason:
                        reasons.setdefault(reason)
                        action += f" [{list(reasons).index(reason) + 1}]"
                share = "-" if branch.share is None else f"{branch.share:.1%}"
                rows.append((block.name, label, branch.shortcut, f"{branch.p:.3f}", action, share))
        lines = [title, *text_table(rows, right={3, 5})]
        lines += [f"[{i}] {reason}" for i, reason in enumerate(reasons, 1)]
        known = [b for block in blocks for b in block.branches if b.share is not None]
        if known:
            saved = sum(b.share * b.p for b in known if b.share and b.action != "mask")
            lines.append(f"expected FLOPs of a forward pass in training: {1 - saved:.1%} of dense")
        elif not settings.measured:
            lines.append("give example_inputs to see the share of each branch in the FLOPs")
        own = max(
            (b.inherited for b in self._branches if b.masks and b.p != b.inherited), default=0.0
        )
        if own:
            lines.append(f"the model's own drop path (up to {own:g}) rests; p=None keeps its rates")
        if not self._is_attached():
            lines.append(
                "taken off again, all of it or in part: nothing follows this plan any more"
            )
        elif any(site.paused for site in self._sites):
            lines.append("paused: nothing is dropped now")
        return "\n".join(lines)


def get_plan(model: nn.Module) -> Plan:
    """The plan of what is attached to ``model``: also to a deepcopy, a loaded copy, or a part.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: Nothing is attached.
    """
    check_model(model)
    sites = sites_of(model)
    if not sites:
        raise ValueError(
            f"there is no stochastic depth on this {type(model).__name__}; "
            f"torchdrop.add_stochastic_depth(model, p) adds it"
        )
    return Plan(model, sites)


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Drop nothing inside the ``with``: for a teacher's forward passes, say, or for calibration.

    Every block runs its own forward, as in the dense model, whatever the rates are: ``p`` has no
    effect, no random number is drawn and :meth:`Plan.observed` counts nothing. With
    ``scale="eval"`` that holds for evaluation, too: branches are not multiplied by 1 - p, so what
    comes out is the dense model's, not that of the trained network in evaluation. Rates stay what
    they are, and those that are set inside act afterwards. Masking layers that were taken over
    rest as before. Pauses may be nested, and end with the ``with``, also by an exception; a copy
    that is made inside is not paused.

    With activation checkpointing run the backward pass inside as well: it computes the blocks
    again.

    Args:
        model: A model with stochastic depth, a part of one, or what wraps one.

    Raises:
        ValueError: There is no stochastic depth on ``model``.

    Example:
        >>> import torch, torchvision, torchdrop
        >>> model = torchvision.models.resnet18()
        >>> plan = torchdrop.add_stochastic_depth(model, p=0.5)
        >>> with torch.no_grad(), torchdrop.paused(model):
        ...     target = model(torch.randn(2, 3, 32, 32))
        >>> plan.observed()["layer4.1"]
        nan
    """
    sites = get_plan(model)._sites
    for site in sites:
        site.paused += 1
        site.settle()
    try:
        yield
    finally:
        for site in sites:
            site.paused -= 1
            site.settle()
