"""The plan of a model with stochastic depth: its rates, what was dropped, and its table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdrop import schedules
from torchdrop.attaching.measure_shares import share_skipped
from torchdrop.attaching.observed_rates import ObservedRates, observed_rates
from torchdrop.attaching.plan_text import lines_of, not_taken_lines, table_of
from torchdrop.attaching.rates import resolve_rates, set_rates
from torchdrop.checks import check_model
from torchdrop.error_pages import see
from torchdrop.finding.residual import Branch, Residual
from torchdrop.rows.shared_numbers import shared_numbers
from torchdrop.running.block_site import BlockSite, sites_of
from torchdrop.running.branch_state import BranchState
from torchdrop.running.forward_slot import occupant_of

__all__ = ["Plan", "get_plan"]


class Plan:
    """The stochastic depth of a model; ``print(plan)`` shows it as a table.

    A plan holds no state of its own. Rates and counts belong to the blocks, so a deepcopy or a
    loaded copy of the model has its own plan, which :func:`get_plan` returns.
    """

    def __init__(self, model: nn.Module, sites: Sequence[BlockSite]) -> None:
        self._model = model
        self._sites = list(sites)

    @property
    def _branches(self) -> list[BranchState]:
        return [branch for site in self._sites for branch in site.branches]

    def _is_attached(self) -> bool:
        """Whether all blocks of this plan still have its stochastic depth."""
        return self._are_all_in(sites_of(self._model))

    def _are_all_in(self, attached: Sequence[BlockSite]) -> bool:
        known = {id(site) for site in attached}
        return all(id(site) in known for site in self._sites)

    def _check_attached(self) -> list[BlockSite]:
        """Return all sites in the model.

        Raises:
            ValueError: Some blocks no longer have the stochastic depth of this plan.
        """
        attached = sites_of(self._model)
        if not self._are_all_in(attached):
            raise ValueError(
                "this plan no longer has an effect, because its stochastic depth was removed from "
                "some or all blocks, or blocks of the model were replaced; "
                "torchdrop.get_plan(model) returns the plan of what is attached now"
                + see("already-attached")
            )
        return attached

    @property
    def blocks(self) -> list[Residual]:
        """The blocks in the order of depth, with their current rates."""
        blocks: dict[str, Residual] = {}
        for site in self._sites:
            for state in site.branches:
                facts = state.facts
                block = blocks.setdefault(facts.block, Residual(facts.block, site.module, []))
                if facts.path is not None:  # if it is None, another site of the block has a path
                    block.module = site.module.get_submodule(facts.path)
                elif facts.above:
                    block.module = self._module_above(site.module, facts.above)
                block.branches.append(
                    Branch(
                        name=facts.name,
                        shortcut=facts.shortcut,
                        action=state.action,
                        reason=state.full_reason(),
                        p=state.rate.p,
                        children=facts.children,
                        masks=facts.masks,
                        share=state.share,
                        partly=facts.partly,
                        proved=state.proved(),
                    )
                )
        return list(blocks.values())

    def _module_above(self, module: nn.Module, levels: int) -> nn.Module:
        """Return the module around ``module``, which is ``module`` itself if it is the model."""
        path = next((name for name, m in self._model.named_modules() if m is module), None)
        if path is None:  # it was replaced
            return module
        atoms = path.split(".")
        return self._model.get_submodule(".".join(atoms[: max(len(atoms) - levels, 0)]))

    def set_p(self, p: Any) -> None:
        """Change the drop probabilities, from the next forward pass on.

        With activation checkpointing, call it only when no backward pass is outstanding: the
        backward pass computes the blocks again, and would use the new rates.

        Args:
            p: As for :func:`add_stochastic_depth`: a float for the deepest block, a sequence, or a
                mapping (blocks that it does not name keep their rate). None restores the rates
                of the model's own masking layers.

        Raises:
            TypeError, ValueError: ``p`` is not one of these, or stochastic depth was removed, or a
                copy of a block was added beside it.
                All rates then stay as they were.
        """
        attached = self._check_attached()
        if len(attached) > len(self._sites):  # not in every step of a training loop
            refuse_doubled_blocks(self._model, self._sites, siblings=True)
        settings = self._sites[0].settings
        set_rates(self._sites, resolve_rates(p, self._branches, settings.blocks, settings.schedule))
        settings.over_time = ""

    def note_schedule(self, rule: object, progress: float) -> None:
        """Let the printed plan say that ``rule`` sets the rates, and where it is."""
        self._sites[0].settings.over_time = f"{_described(rule)}, now at progress {progress:.4g}"

    def observed(self) -> dict[str, float]:
        """Return the observed drop rate of each branch since the last call: dropped rows / rows.

        Counted in this process, in training; rows that activation checkpointing computes again
        count once. A branch whose block runs its own forward because all its rates are 0 is not
        counted and gets 0. A branch with a rate that no row has reached is left out, and a warning
        is given once.

        Raises:
            ValueError: Stochastic depth was removed, and nothing was counted before that.
        """
        found = self.observed_rates(reset=True)
        idle = {branch.facts.name for branch in self._branches if branch.rate.p == 0.0}
        return {
            name: found.rate for name, found in found.branches.items() if found.rows or name in idle
        }

    def observed_rates(self, *, reset: bool = False) -> ObservedRates:
        """Return the observed drop rate of each branch, with its rows and its 95 % interval.

        Counted as for :meth:`observed`, since the counts were last reset. If branches have a rate
        but no row has reached them, a warning says so once: the model may be in evaluation, or the
        forward pass may not call these blocks.

        Args:
            reset: Whether to begin counting anew, as :meth:`observed` does.

        Returns:
            The rate of each branch in ``branches``, and over all branches in ``total``. Each has
            ``rate``, ``rows``, ``low`` and ``high``.

        Raises:
            ValueError: Stochastic depth was removed, and nothing was counted before that.

        Example:
            >>> import torch, torchvision, torchdrop
            >>> model = torchvision.models.resnet18()
            >>> plan = torchdrop.add_stochastic_depth(model, p=0.5, schedule="uniform")
            >>> _ = model(torch.randn(8, 3, 64, 64))
            >>> plan.observed_rates().branches["layer4.1"].rate
            0.5
        """
        found = observed_rates(self._branches)
        if not found.total.rows:
            self._check_attached()
        self._warn_of_unreached(found)
        if reset:
            for branch in self._branches:
                branch.counts.rows_seen = branch.counts.rows_dropped = 0
        return found

    def _warn_of_unreached(self, found: ObservedRates) -> None:
        """Warn once if branches have a rate, but no row has reached them."""
        settings = self._sites[0].settings
        missed = [
            branch.facts.name
            for branch in self._branches
            if branch.rate.p > 0.0 and not found.branches[branch.facts.name].rows
        ]
        if not missed or settings.warned_of_unreached or any(site.paused for site in self._sites):
            return
        if not found.total.rows and any(site.module.training for site in self._sites):
            return  # there was no forward pass yet
        settings.warned_of_unreached = True
        some = ", ".join(missed[:4]) + (f" and {len(missed) - 4} more" if len(missed) > 4 else "")
        if found.total.rows:
            why = "the forward pass did not reach them, or their blocks are in evaluation"
        else:
            why = "the model is in evaluation, in which nothing is dropped; call model.train()"
        warnings.warn(
            f"nothing was dropped in {some} since the counts were last reset, although "
            f"{'they have' if len(missed) > 1 else 'it has'} a drop rate: {why}",
            stacklevel=3,
        )

    def last_kept(self) -> dict[str, Tensor]:
        """Return the indices of the rows that each branch kept in the last training forward."""
        kept = {}
        for branch in self._branches:
            if branch.counts.last is not None:
                rows, number = branch.counts.last
                if isinstance(rows, bool):
                    kept[branch.facts.name] = torch.arange(number)
                else:
                    kept[branch.facts.name] = torch.as_tensor(rows[:number]).sort().values
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Return the rates, and the state of the random numbers that all ranks share.

        Save it together with the state_dict of the model. To continue a run bit for bit, also save
        the state of the generator (``torch.get_rng_state()``), from which all other random numbers
        are drawn.
        """
        return {
            "version": 1,
            "p": {branch.facts.name: branch.rate.p for branch in self._branches},
            "shared_numbers": shared_numbers.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            TypeError, ValueError: The branches are not those of this model, the version is
                unknown, or a value is not legal. Nothing is changed then.
        """
        self._check_attached()
        if not isinstance(state, Mapping) or "p" not in state or state.get("version") != 1:
            raise ValueError("state has to be what Plan.state_dict() returned, of version 1")
        names = [branch.facts.name for branch in self._branches]
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
        blocks = self.blocks
        table = table_of(blocks, self._sites[0].settings.measured)
        return "\n".join([*lines_of([self._title(blocks)]), *table, *lines_of(self._notes(blocks))])

    def _title(self, blocks: Sequence[Residual]) -> str:
        """Return the first line of the printed plan."""
        settings = self._sites[0].settings
        how = f"{settings.mode} mode"
        if settings.mode == "row":
            how += f", {settings.sampling} sampling"
        if settings.unit == "block":
            how += ", one decision a block"
        dims = sorted({branch.facts.dim for branch in self._branches})
        if dims != [0]:
            how += f", batch on dimension {' or '.join(map(str, dims))}"
        count = sum(len(block.branches) for block in blocks)
        return (
            f"stochastic depth on {type(self._model).__name__}: {len(blocks)} blocks, "
            f"{count} branches; {how}, scale={settings.scale!r}"
        )

    def _notes(self, blocks: Sequence[Residual]) -> list[str]:
        """Return the lines below the table."""
        notes = []
        branches = [branch for block in blocks for branch in block.branches]
        if self._sites[0].settings.measured:
            saved = share_skipped(branches, [branch.p for branch in branches])
            notes.append(f"expected FLOPs of a forward pass in training: {1 - saved:.1%} of dense")
        else:
            notes.append("give example_inputs to see the share of each branch in the FLOPs")
        if self._sites[0].settings.over_time:
            notes.append(f"rate over time: {self._sites[0].settings.over_time}")
        notes.append(self._proofs(blocks))
        notes += not_taken_lines(self._sites[0].settings.not_taken)
        overridden = [
            b.facts.inherited
            for b in self._branches
            if b.facts.masks and b.rate.p != b.facts.inherited
        ]
        if max(overridden, default=0.0):
            notes.append(
                f"the model's own drop path layers (rates up to {max(overridden):g}) are inactive, "
                f"p replaces their rates; p=None uses their rates"
            )
        inherits = any(
            b.facts.masks and b.rate.p == b.facts.inherited > 0.0 for b in self._branches
        )
        settings = self._sites[0].settings
        if inherits and (settings.mode, settings.sampling) == ("row", "exact"):
            notes.append(
                "the model's own drop path layers draw each row independently; exact sampling "
                "drops a fixed number of rows of each batch, on average as many; "
                "sampling='independent' draws as they do"
            )
        for name, path in doubled_blocks(self._model, self._sites):
            notes.append(
                f"{path} has the stochastic depth of another block {name}, as a copy of it has: it "
                f"is not part of this plan"
            )
        if not self._is_attached():
            notes.append("removed from the model, or from some blocks: this plan has no effect")
        elif any(site.paused for site in self._sites):
            notes.append("paused: nothing is dropped now")
        return notes

    def _proofs(self, blocks: Sequence[Residual]) -> str:
        """Return the line that says how many branches were proved."""
        if not self._sites[0].settings.verify:
            return "not proved, because of verify=False"
        branches = [branch for block in blocks for branch in block.branches]
        proved = sum(branch.proved is True for branch in branches)
        line = f"proved: {proved} of {len(branches)} branches"
        if any(branch.proved is None for branch in branches):
            line += f"; {'the others' if proved else 'each'} in its first call in training"
        return line


def _described(rule: object) -> str:
    """Return the name of a function, or the text that another rule prints."""
    return str(getattr(rule, "__qualname__", None) or repr(rule))


def doubled_blocks(model: nn.Module, sites: Sequence[BlockSite]) -> list[tuple[str, str]]:
    """Return the name and the path of each block that has the name of a block of a plan.

    A copy of a block has the name of the original. So have blocks of two models that got stochastic
    depth one by one.

    Args:
        model: The model, which may hold more blocks than ``sites`` are of.
        sites: The sites of a plan.
    """
    known = {branch.facts.name: site for site in reversed(sites) for branch in site.branches}
    found = []
    for path, module in model.named_modules():
        occupant = occupant_of(module)
        if not isinstance(occupant, BlockSite):
            continue
        facts = occupant.branches[0].facts
        if known.get(facts.name, occupant) is not occupant:
            found.append((facts.block, path))
    return found


def refuse_doubled_blocks(model: nn.Module, sites: Sequence[BlockSite], siblings: bool) -> None:
    """Raise ValueError if a block of ``model`` has the name of another one.

    Args:
        model: The model.
        sites: The sites of its plan.
        siblings: Whether only copies in the list of the original are refused, which belong to the
            same stack. A teacher, say, may be a copy of a student, and have rates of its own.
    """
    for name, path in doubled_blocks(model, sites):
        if siblings and name.rpartition(".")[0] != path.rpartition(".")[0]:
            continue
        raise ValueError(
            f"each block of a plan has to have a name of its own, but {path!r} has the stochastic "
            f"depth of another block {name!r}, as a copy of it has; call torchdrop.get_plan for "
            f"the part of the model that is meant, or remove stochastic depth and add it again"
            + see("already-attached")
        )


def get_plan(model: nn.Module) -> Plan:
    """Return the plan of ``model``, which may also be a deepcopy, a loaded copy, or a part.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no stochastic depth, or two of its blocks have the same name.
    """
    check_model(model)
    sites = sites_of(model)
    if not sites:
        raise ValueError(
            f"this {type(model).__name__} has no stochastic depth; "
            f"torchdrop.add_stochastic_depth(model, p) adds it" + see("already-attached")
        )
    refuse_doubled_blocks(model, sites, siblings=False)
    return Plan(model, sites)
