"""WHO AND WHAT FOR: what every site does with a branch. Who is kept, what is cut, what is left out.

A site stands in the ``forward`` slot of a block (slot.py). It draws who is kept, cuts the inputs of
a branch to those rows, and gives what a dropped branch leaves behind: the skip, in the dtype of the
sum, and gradients of zeros.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from torchdrop.finding.row_layout import RowLayout
from torchdrop.rows.collectives import is_sharded, meets_ranks
from torchdrop.rows.in_graph import run_uncompiled
from torchdrop.rows.sampling import keep_batch, order_rows, refuse_recording
from torchdrop.rows.take_and_add import take, with_zero_grads
from torchdrop.running.branch_state import BranchState, Settings
from torchdrop.running.forward_slot import SlotOccupant, occupant_of
from torchdrop.tracing.call_arguments import is_cache

__all__ = ["BlockSite", "drop_spare_row", "precision_of", "sites_of", "to_device_of", "unchanged"]

# With one kept row, BatchNorm needs more than one value a channel from that row alone. A branch
# may stride, so below this many positions a second row is computed along, and not used.
_POSITIONS_FOR_ONE_ROW = 64


class BlockSite(SlotOccupant):
    """What stands in the ``forward`` slot of a block, and keeps some rows of its branches."""

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        branches: list[BranchState],
        look_through: Sequence[str] = (),
    ) -> None:
        super().__init__(module)
        self.settings = settings
        self.branches = branches
        # The children whose forward is read as part of the block's own.
        self.look_through = list(look_through)
        self.active = False
        self.paused = 0  # how many pauses the model is in

    def __getstate__(self) -> dict[str, Any]:
        # a copy made during a pause has nobody who would end it
        active = any(branch.p > 0.0 for branch in self.branches)
        return {**self.__dict__, "paused": 0, "active": active}

    def settle(self) -> None:
        """Act where a branch has a rate and nobody paused the model; rest otherwise."""
        self.active = not self.paused and any(branch.p > 0.0 for branch in self.branches)

    @property
    def __name__(self) -> str:
        return "forward"

    @property
    def __globals__(self) -> dict[str, Any]:
        # torch.jit.script asks for it; everyone else takes the AttributeError for a no.
        raise AttributeError(
            "torch.jit.script cannot compile stochastic depth; call "
            "torchdrop.remove_stochastic_depth(model) first, or use torch.jit.trace in evaluation"
        )

    def _check_caches(self, values: Sequence[Any], training: bool) -> None:
        """Refuse a key/value cache that holds something: it cannot be cut by rows."""
        for cache in filter(is_cache, values):
            indices = (getattr(m, "layer_idx", None) for m in self.module.modules())
            index = next((i for i in indices if isinstance(i, int)), 0)
            name = self.branches[0].block
            if not training:
                raise ValueError(
                    f"{name} is called with a key/value cache, but with scale='eval' its branches "
                    f"are computed one by one in evaluation; pass use_cache=False, or use "
                    f"scale='train'"
                )
            if _holds_something(cache, index):
                raise ValueError(
                    f"{name} is called in training with a key/value cache that is filled, which "
                    f"cannot be cut by rows; pass use_cache=False"
                )
            if not self.settings.warned:
                self.settings.warned = True
                warnings.warn(
                    "in training the model makes a key/value cache; stochastic depth puts None in "
                    "its place in the blocks that it acts on. Pass use_cache=False",
                    stacklevel=2,
                )

    def _meets_ranks(self, branch: BranchState) -> bool:
        """Whether every rank has to run ``branch`` each time, since others wait for it there."""
        if not dist.is_available() or not dist.is_initialized():
            return False
        for path in self.look_through:
            if is_sharded(self.module.get_submodule(path)):
                raise RuntimeError(
                    f"{path} went through fully_shard, but stochastic depth runs its parts "
                    f"separately, as {branch.block} adds in it; shard {branch.block} whole"
                )
        modules = [
            module  # of a block that is dropped whole, what is inside: it may be sharded itself
            for path in branch.inner
            for module in ([self.module.get_submodule(path)] if path else self.module.children())
        ]
        alike = self.settings.mode == "batch" and self.settings.sync_ranks is not False
        waits = meets_ranks(modules, branch.name, alike=alike)
        if waits is None:
            return False
        if branch.action != "mask":
            branch.action = "mask"
            branch.reason = f"{waits} inside: no rank may leave out what the others wait for"
        return True

    def _draw(self, branch: BranchState, x: Tensor) -> tuple[Any, int]:
        """Who is kept, and how many.

        True for every row of ``x``, False for none; else all, on the host, the kept ones first.
        """
        if branch.dim >= x.dim():
            raise ValueError(
                f"the batch is on dimension {branch.dim} as batch_dim says, but the skip of "
                f"{branch.name} has the shape {tuple(x.shape)}; take stochastic depth off and give "
                f"another batch_dim, or none"
            )
        refuse_recording(x)
        batch, settings = x.shape[branch.dim], self.settings
        rows: Any
        if branch.p == 0.0:
            rows, kept = True, batch
        elif settings.mode == "batch":
            rows = keep_batch(branch.p, settings.sync_ranks)
            kept = batch if rows else 0
        else:
            rows, kept = order_rows(batch, branch.p, branch.sampling)
            rows = rows if 0 < kept < batch else kept > 0
        branch.count(batch, rows, kept)
        return rows, kept

    def _rows_to_compute(self, branch: BranchState, rows: Tensor, skip: Tensor, dim: int) -> Tensor:
        """``rows``, and one more where BatchNorm could not stand a single one."""
        if not branch.has_batch_norm or rows.shape[0] != 1 or skip.dim() < 2:
            return rows
        positions = skip.numel() // max(skip.shape[dim] * skip.shape[1], 1)
        if positions > _POSITIONS_FOR_ONE_ROW:
            return rows
        batch = skip.shape[dim]
        other = (rows + 1 + torch.randint(batch - 1, (1,), device="cpu")) % batch
        return torch.cat([rows, other]).sort().values

    @staticmethod
    def _cut(
        branch: BranchState,
        value: Any,
        taking: Callable[..., Tensor],
        how: RowLayout | None,
        batch: int,
        known: bool = True,
    ) -> Any:
        """What ``taking`` gives of ``value``, an input of ``branch``.

        Its rows are on a dimension, some entries each: that is ``how``, None where it has no rows.
        If that is ``known``, not just assumed, a single slice is broadcast to what rows there are.
        """
        if how is None or (known and value.shape[how[0]] == 1):
            return value
        dim, entries = how
        if not isinstance(value, Tensor):
            raise RuntimeError(
                f"the branch {branch.name} takes a {type(value).__name__}, which cannot be cut by "
                f"rows; use compute='mask', or leave the block out with select="
            )
        if value.dim() <= dim or value.shape[dim] != batch * entries:
            raise RuntimeError(
                f"the branch {branch.name} takes a tensor of shape {tuple(value.shape)}, which "
                f"does not have the {batch} rows of its skip on dimension {dim}; "
                f"use compute='mask', or leave the block out with select="
            )
        if entries == 1:
            return taking(value, dim=dim)
        apart = value.reshape(*value.shape[:dim], batch, entries, *value.shape[dim + 1 :])
        return taking(apart, dim=dim).flatten(dim, dim + 1)

    def _dropped(
        self, branch: BranchState, skip: Tensor, inputs: tuple[Any, ...], dtype: torch.dtype
    ) -> Tensor:
        """The skip alone: a new tensor, which an activation in place may write into."""
        unused = self._unused(branch, skip, inputs)
        if branch.writes_skip:
            return skip.add_(with_zero_grads(skip.new_zeros(()), unused)) if unused else skip
        if dtype != skip.dtype:
            skip = skip.to(dtype)
        return with_zero_grads(skip, unused)

    def _unused(self, branch: BranchState, skip: Tensor, inputs: Sequence[Any]) -> list[Tensor]:
        """What has to get a gradient of zeros when ``branch`` is dropped."""
        unused: list[Tensor] = []
        if self.settings.zero_grad and torch.is_grad_enabled():
            for path in branch.inner:
                unused += _parameters_of(attrgetter(path)(self.module) if path else self.module)
            unused.extend(attrgetter(path)(self.module) for path in branch.own)
            unused.extend(t for t in inputs if isinstance(t, Tensor) and t is not skip)
        return unused

    def _dtype_of(
        self, branch: BranchState, skip: Tensor, inputs: Iterable[Any], run: Callable[[], Any]
    ) -> torch.dtype:
        """The dtype of the skip plus what ``run`` gives, which is run where nothing else tells."""
        precision = precision_of(skip)
        dtype = branch.dtypes.get(precision)
        if dtype is not None:
            return dtype
        if branch.writes_skip or torch.compiler.is_compiling():
            return skip.dtype
        inner = [self.module.get_submodule(path) for path in branch.inner]
        takes = [*(p for top in inner for p in top.parameters()), *inputs]
        takes += [attrgetter(path)(self.module) for path in branch.own]
        others = {t.dtype for t in takes if isinstance(t, Tensor) and t.is_floating_point()}
        if precision[1] is None and others <= {skip.dtype}:
            return skip.dtype
        with torch.no_grad(), unchanged(inner, skip.device):
            out = run()
        branch.dtypes[precision] = torch.promote_types(skip.dtype, out.dtype)
        return branch.dtypes[precision]


def _holds_something(cache: Any, layer: int) -> bool:
    try:
        return bool(cache.get_seq_length(layer) > 0)
    except Exception:  # that of a state-space model does not count tokens
        layers = getattr(cache, "layers", ())
        states = getattr(layers[layer], "has_previous_state", {}) if layer < len(layers) else {}
        return any(states.values())


def _parameters_of(module: nn.Module) -> list[Tensor]:
    """What ``module.parameters()`` gives, tied ones twice, several times as fast."""
    found: list[Tensor] = [p for p in module._parameters.values() if p is not None]
    for child in module._modules.values():
        if child is not None:
            found += _parameters_of(child)
    return found


def drop_spare_row(out: Tensor, computed: Tensor, rows: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of ``out``, which was computed on more, what belongs to ``rows``; and these beside it."""
    place = (computed == rows).nonzero().flatten()
    return take(out, to_device_of(place, out), dim), to_device_of(rows, out)


def to_device_of(rows: Tensor, x: Tensor) -> Tensor:
    """``rows``, which are on the host, on the device of ``x``; nothing waits for the copy."""
    return rows if x.is_cpu else rows.to(x.device, non_blocking=True)


@contextmanager
def unchanged(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Leave the buffers of ``modules`` and the random numbers as they are."""
    places = [
        (module, name, buffer)
        for top in modules
        for module in top.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type  # cuda is fork_rng's own default
    with torch.random.fork_rng(devices=devices, device_type=kind):
        try:
            for module, name, buffer in places:
                module._buffers[name] = buffer.clone()
            yield
        finally:
            for module, name, buffer in places:
                module._buffers[name] = buffer


def precision_of(x: Tensor) -> tuple[Any, ...]:
    """What decides, besides the branch itself, which dtype skip + branch has."""
    if not torch._C._is_any_autocast_enabled():
        return x.dtype, None
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.dtype, torch.get_autocast_dtype(kind) if autocast else None


def sites_of(model: nn.Module) -> list[BlockSite]:
    """Every site in ``model``, in the order of its depth."""
    found = [s for m in model.modules() if isinstance(s := occupant_of(m), BlockSite)]
    return sorted(found, key=lambda site: (site.branches[0].index, site.branches[0].order))


run_uncompiled(__name__)
