"""StochasticDepth: a module that is skipped, not masked, with probability p."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchdrop.checks import check_dim, check_input, check_mode
from torchdrop.layers.base import LayerWithRate, fx_node_of_call
from torchdrop.rows.collectives import meets_ranks
from torchdrop.rows.sampling import keep_batch, keep_rows, refuse_recording
from torchdrop.rows.take_and_add import take, with_zero_grads

__all__ = ["StochasticDepth"]

SCALES = ("train", "eval", "none")

# Input shapes for which a StochasticDepth remembers that skip and module agree.
_MAX_CHECKED_SHAPES = 64


def _scale_residual(skip: Tensor, out: Tensor, keep: float) -> Tensor:
    """``skip + (out - skip) / keep``, and ``out`` itself where nothing is to be scaled."""
    return skip + (out - skip) / keep if keep < 1.0 else out


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _output_shape(
    module: nn.Module, x: Tensor, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> tuple[int, ...] | None:
    """The shape of ``module(x, ...)``, computed without computing anything; None if it cannot be.

    Runs a copy whose parameters, buffers and inputs are on the meta device: no statistics, no
    counters, no hooks and no random numbers of the module itself are touched.
    """

    def ghost(t: Tensor) -> Tensor:
        # One dtype for all: autocast, which reconciles them, does not know the meta device.
        dtype = torch.float32 if t.is_floating_point() else t.dtype
        return torch.empty_like(t, device="meta", dtype=dtype)

    def ghosts(value: Any) -> Any:
        return torch.utils._pytree.tree_map_only(Tensor, ghost, value)

    try:
        memo: dict[int, Any] = {}
        for p in module.parameters():
            memo[id(p)] = nn.Parameter(ghost(p), requires_grad=False)
        for b in module.buffers():
            memo[id(b)] = ghost(b)
        twin = copy.deepcopy(module, memo)
        for part in twin.modules():
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = twin(*ghosts((x, *args)), **ghosts(kwargs or {}))
    except Exception:  # whatever a module may raise where it meets a tensor without values
        return None
    return tuple(out.shape) if isinstance(out, Tensor) else None


def _copy_of_first_conv(module: nn.Module) -> nn.Module:
    """A deep copy of the first convolution of ``module``, where it can stand in for ``module``."""
    convs = (
        (name, m)
        for name, m in module.named_modules()
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    )
    name, conv = next(convs, (None, None))
    if conv is None:
        raise ValueError(
            f"projection='copy' needs a convolution in the module, but {type(module).__name__} "
            "has none; pass projection=nn.Module or None"
        )
    advice = (
        "pass a module that does, projection=nn.Conv2d(...) of the right channels and stride, or "
        "the shortcut that the stage already has (layer[0].downsample in torchvision's ResNets)"
    )
    size = (64,) * len(conv.kernel_size)
    probe = torch.empty(2, conv.in_channels, *size, device="meta", dtype=conv.weight.dtype)
    ours, theirs = _output_shape(conv, probe), _output_shape(module, probe)
    if ours is not None and theirs is not None:
        if ours != theirs:
            raise ValueError(
                f"projection='copy' does not fit: on an input of shape {tuple(probe.shape)} the "
                f"first convolution, {name!r}, gives {ours}, but the module gives {theirs}; "
                f"{advice}"
            )
        return copy.deepcopy(conv)
    # The module does not run on a tensor without values: read what its last layer says.
    last = [
        getattr(m, "out_channels", None) or getattr(m, "num_features", None)
        for m in module.modules()
    ]
    channels = next((c for c in reversed(last) if isinstance(c, int)), conv.out_channels)
    if channels != conv.out_channels:
        raise ValueError(
            f"projection='copy' does not fit: the first convolution, {name!r}, gives "
            f"{conv.out_channels} channels, but the module seems to give {channels}; {advice}"
        )
    return copy.deepcopy(conv)


class StochasticDepth(LayerWithRate):
    """A module that is skipped at random while training: what is dropped is not computed.

    With ``s(x) = x``, or ``projection(x)`` where the module ``m`` changes the shape:

    =======  =======================  ===========================  ==========================
    scale    training, dropped (p)    training, kept (1 - p)       evaluation
    =======  =======================  ===========================  ==========================
    "train"  ``s(x)``                 ``s + (m(x) - s) / (1-p)``   ``m(x)``
    "eval"   ``s(x)``                 ``m(x)``                     ``(1-p) m(x) + p s(x)``
    "none"   ``s(x)``                 ``m(x)``                     ``m(x)``
    =======  =======================  ===========================  ==========================

    ``m`` is a whole block or stage, its own skip connection included: ``m(x) - s`` is then its
    residual branch. "train" keeps the mean of the output, "eval" is the rule of the paper, "none"
    is LayerDrop. Where the factor is 1 the output is ``m(x)`` itself, not a sum that rounds.

    Wrapping renames the keys of a state dict, ``layer1.0.conv1.weight`` becomes
    ``layer1.module.0.conv1.weight``: load weights first, wrap afterwards.
    (:func:`torchdrop.add_stochastic_depth` drops branches of a model and renames nothing.)

    Example:
        >>> model = torchvision.models.resnet18(weights="DEFAULT")
        >>> model.layer1 = StochasticDepth(model.layer1, 0.2)
        >>> model.layer2 = StochasticDepth(model.layer2, 0.2, projection="copy")
        >>> model.layer3 = StochasticDepth(model.layer3, 0.2, model.layer3[0].downsample)
        >>> model.layer4 = StochasticDepth(model.layer4, 0.2, nn.Conv2d(256, 512, 1, stride=2))

    Decisions are drawn on the host from torch's global CPU generator: ``torch.manual_seed``
    governs them and activation checkpointing replays them. In a process group, all ranks take the
    decisions of ``mode="batch"`` alike (see ``sync_ranks``) and draw rows of their own in "row".
    ``torch.compile`` breaks the graph at the decision, since what runs depends on it. A module in
    which ranks wait for each other (SyncBatchNorm, or ``fully_shard`` inside) is not skipped, but
    run in full and masked.

    Args:
        module: The module m. It takes a tensor first and returns a tensor; more arguments are
            passed on.
        p: The probability of dropping, in [0, 1]; may be set later. With 1 the module never runs
            while training, with 0 it always does and nothing else.
        projection: What stands in for a module that changes the shape. ``None``: x itself. A
            module: it may be new, trained with the rest, or a part of ``module`` (its keys are then
            in the state dict twice, its parameters once; BatchNorm in it sees kept batches twice).
            ``"copy"``: a copy of the first convolution in ``module``, weights included; refused
            where that does not give the shape of the module's output.
        mode: ``"batch"``: one decision a call (the paper). ``"row"``: each sample its own, and the
            module runs on the rows that are kept, a uniformly random subset whose mean size is
            exactly ``(1-p) * batch``. Then no tensor may be among the other arguments, because
            nothing tells whether it would have to be cut with the rows.
        scale: ``"train"``, ``"eval"`` or ``"none"``, see the table.
        batch_dim: The dimension that counts samples, for ``mode="row"``.
        sync_ranks: Whether all ranks of a process group decide alike in ``mode="batch"``, else a
            step is as slow as the rank that keeps most. None: they do.
        zero_grad: Give the parameters of what did not run, the module or a projection that was not
            needed, gradients of zero, which DistributedDataParallel waits for. False leaves None.

    Shape:
        ``m(x)`` and ``s(x)`` have to have the same shape. This is checked whenever both are known,
        and else once for each shape of input, by running a copy of the one that was not needed on
        the meta device: that computes nothing and touches no state.

    In training with p > 0 the output has the dtype of ``x``, whichever way the decision went;
    under autocast ``s(x)`` and ``m(x)`` may have others. With p = 0, and in evaluation unless
    ``scale`` is "eval", ``m(x)`` is returned as it is.

    Raises:
        TypeError: ``module`` is no module, ``projection`` none of the above, ``p`` no real number;
            or, when called, the input is no floating-point tensor or the output no tensor.
        ValueError: ``p``, ``mode`` or ``scale`` is out of range, ``projection="copy"`` does not
            fit; or, when called, the shapes do not agree, or ``mode="row"`` got more tensors.
        RuntimeError: ``module`` changes its input in place where the skip needs it too.

    Reference:
        Huang et al. 2016, Deep Networks with Stochastic Depth, arXiv:1603.09382 ("eval"); Fan et
        al. 2020, Reducing Transformer Depth on Demand with Structured Dropout, arXiv:1909.11556
        ("none").
    """

    def __init__(
        self,
        module: nn.Module,
        p: float,
        projection: nn.Module | str | None = None,
        mode: str = "batch",
        scale: str = "train",
        *,
        batch_dim: int = 0,
        sync_ranks: bool | None = None,
        zero_grad: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module has to be an nn.Module, but got {type(module).__name__}")
        self.p = p
        check_mode(mode)
        if scale not in SCALES:
            raise ValueError(f"scale has to be 'train', 'eval' or 'none', but got {scale!r}")
        if isinstance(projection, str):
            if projection != "copy":
                raise ValueError(
                    f"projection has to be an nn.Module, 'copy' or None, but got {projection!r}"
                )
            projection = _copy_of_first_conv(module)
        elif projection is not None and not isinstance(projection, nn.Module):
            raise TypeError(
                "projection has to be an nn.Module, 'copy' or None, "
                f"but got {type(projection).__name__}"
            )
        self.module = module
        self.projection = projection
        self.mode = mode
        self.scale = scale
        self.batch_dim = check_dim(batch_dim)
        if sync_ranks is not None and not isinstance(sync_ranks, bool):
            raise TypeError(f"sync_ranks has to be None, True or False, but got {sync_ranks!r}")
        self.sync_ranks = sync_ranks
        self.gives_zero_grads = zero_grad  # nn.Module has a method zero_grad
        self._checked_shapes: set[tuple[int, ...]] = set()
        # This flag only: a BatchNorm frozen inside the module stays as it is.
        self.training = module.training

    def extra_repr(self) -> str:
        """The rate and the rules."""
        text = f"p={self.p}, mode={self.mode!r}, scale={self.scale!r}"
        if self.batch_dim != 0:
            text += f", batch_dim={self.batch_dim}"
        if self.sync_ranks is not None:
            text += f", sync_ranks={self.sync_ranks}"
        return text if self.gives_zero_grads else text + ", zero_grad=False"

    def forward(self, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``m(x)``, ``s(x)`` or their mixture, by the table of the class."""
        node = fx_node_of_call(self, (x, *args), kwargs)
        if node is not None:
            return node
        check_input(x)
        if self.p == 0.0 or (not self.training and self.scale != "eval"):
            return self._unscaled(x, args, kwargs)
        if not self.training:
            return self._expected(x, args, kwargs)
        refuse_recording(x)
        alike = self.mode == "batch" and self.sync_ranks is not False
        if meets_ranks([self.module], type(self.module).__name__, alike=alike):
            out = self._masked(x, args, kwargs)
        elif self.mode == "row":
            out = self._by_rows(x, args, kwargs)
        elif keep_batch(self.p, self.sync_ranks):
            out = self._kept(x, args, kwargs)
        else:
            out = self._dropped(x, args, kwargs)
        # Under autocast s and m may disagree, and when m is dropped its dtype is not known.
        return out.to(x.dtype)

    def _by_rows(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if any(True for _ in _tensors((args, kwargs))):
            raise ValueError(
                "mode='row' takes one tensor, since nothing tells whether another one would "
                "have to be cut with the rows; use mode='batch', or "
                "torchdrop.add_stochastic_depth, which finds out"
            )
        dim = check_dim(self.batch_dim, x.dim())
        batch = x.shape[dim]
        kept = keep_rows(batch, self.p)
        if len(kept) == 0:
            return self._dropped(x, args, kwargs)
        if len(kept) == batch:
            return self._kept(x, args, kwargs)
        index = kept.to(x.device, non_blocking=True)
        part = take(x, index, dim)
        skip = self._skip(x)
        part_skip = part if skip is x else take(skip, index, dim)
        out = self._run(part, args, kwargs)
        self._compare(x, tuple(part_skip.shape), tuple(out.shape), tuple(part.shape))
        if self.scale == "train":
            out = _scale_residual(part_skip, out, 1.0 - self.p)
        # Not index_copy, which makes channels_last contiguous; a clone keeps the format.
        return skip.clone().index_copy_(dim, index, out.to(skip.dtype))

    def _masked(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The same, with the module run in full: other ranks wait for it there."""
        dim = check_dim(self.batch_dim, x.dim())
        kept = torch.zeros(x.shape[dim], dtype=torch.bool, device="cpu")
        if self.mode == "row":
            kept[keep_rows(x.shape[dim], self.p)] = True
        else:
            kept.fill_(keep_batch(self.p, self.sync_ranks))
        skip = self._skip(x)
        out = self._run(x, args, kwargs)
        self._compare(x, tuple(skip.shape), tuple(out.shape))
        if self.scale == "train":
            out = _scale_residual(skip, out, 1.0 - self.p) if self.p < 1.0 else out
        kept = kept.to(x.device, non_blocking=True).view(
            [-1 if d == dim else 1 for d in range(x.dim())]
        )
        return torch.where(kept, out, skip)

    def _kept(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.scale != "train":
            return self._unscaled(x, args, kwargs)
        skip = self._skip(x)
        out = self._run(x, args, kwargs)
        self._compare(x, tuple(skip.shape), tuple(out.shape))
        return _scale_residual(skip, out, 1.0 - self.p)

    def _dropped(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """s(x), a new tensor: an in-place activation that follows must not change x."""
        skip = self._skip(x)
        if self._is_new(x):
            self._compare(x, tuple(skip.shape), _output_shape(self.module, x, args, kwargs))
        if self.gives_zero_grads:
            return with_zero_grads(skip, self.module.parameters())
        return skip.clone() if skip is x else skip

    def _unscaled(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """m(x) as it is. s(x) is not needed; its shape is looked at once."""
        skip: tuple[int, ...] | None = tuple(x.shape)
        if self.projection is not None:
            skip = _output_shape(self.projection, x) if self._is_new(x) else None
        out = self._run(x, args, kwargs, may_write=True)
        self._compare(x, skip, tuple(out.shape))
        if self.training and self.gives_zero_grads and self.projection is not None:
            out = with_zero_grads(out, self.projection.parameters())  # it did not run either
        return out

    def _expected(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """(1-p) m(x) + p s(x), the mean of what training gives."""
        if self.p == 1.0:  # 0 * m(x) is not needed, and NaN where m, never trained, gives inf
            return self._dropped(x, args, kwargs)
        skip = self._skip(x)
        out = self._run(x, args, kwargs)
        self._compare(x, tuple(skip.shape), tuple(out.shape))
        return (1.0 - self.p) * out + self.p * skip

    def _skip(self, x: Tensor) -> Tensor:
        if self.projection is None:
            return x
        skip: Tensor = self.projection(x)
        return skip

    def _run(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], *, may_write: bool = False
    ) -> Tensor:
        watch = not (may_write or torch.compiler.is_compiling() or x.is_inference())
        version = x._version if watch else 0
        out = self.module(x, *args, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(
                "StochasticDepth needs a module that returns a tensor, but "
                f"{type(self.module).__name__} returned {type(out).__name__}"
            )
        if watch and x._version != version:
            raise RuntimeError(
                f"{type(self.module).__name__} changes its input in place, so the input that the "
                "skip needs is gone; give its first activation inplace=False"
            )
        return out

    def _is_new(self, x: Tensor) -> bool:
        """Whether no input of this shape, the batch aside, has been compared yet."""
        return (
            not torch.compiler.is_compiling()
            and self._shape_of_sample(x) not in self._checked_shapes
        )

    def _shape_of_sample(self, x: Tensor) -> tuple[int, ...]:
        shape = list(x.shape)
        del shape[check_dim(self.batch_dim, x.dim())]
        return tuple(shape)

    def _compare(
        self,
        x: Tensor,
        skip: tuple[int, ...] | None,
        out: tuple[int, ...] | None,
        seen: tuple[int, ...] | None = None,
    ) -> None:
        """Compare the shapes of s(x) and m(x); None stands for one that could not be known."""
        if skip is not None and out is not None and skip != out:
            name = "x" if self.projection is None else "projection(x)"
            raise ValueError(
                f"a dropped {type(self.module).__name__} is replaced by {name}, so both have to "
                f"have the same shape, but {name} has {skip} and module(x) has {out}, for an "
                f"input of shape {seen or tuple(x.shape)}; pass a projection, an nn.Module that "
                f"maps the input to the shape of module(x)"
            )
        if not torch.compiler.is_compiling():
            if len(self._checked_shapes) >= _MAX_CHECKED_SHAPES:
                self._checked_shapes.clear()
            self._checked_shapes.add(self._shape_of_sample(x))
