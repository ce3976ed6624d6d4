"""StochasticDepth: skip a module, instead of masking its output, with probability p."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchdrop.checks import check_choice, check_dim, check_input, check_mode
from torchdrop.internals import clear_forward_hooks, modifications_of, tree_map_only
from torchdrop.layers.base import LayerWithRate, fx_node_of_call
from torchdrop.layers.draws import along_dim
from torchdrop.rows.collectives import find_communicating_module
from torchdrop.rows.sampling import keep_batch, keep_rows, refuse_graph_capture
from torchdrop.rows.take_and_add import take, with_zero_grads

__all__ = ["StochasticDepth"]

SCALES = ("train", "eval", "none")

# The number of input shapes for which a layer remembers that skip and module agree in shape.
_MAX_CHECKED_SHAPES = 64


def _scale_residual(skip: Tensor, out: Tensor, keep: float) -> Tensor:
    """Return ``skip + (out - skip) / keep``, and ``out`` itself if ``keep`` is 1."""
    return skip + (out - skip) / keep if keep < 1.0 else out


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _output_shape_of(
    module: nn.Module, x: Tensor, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> tuple[int, ...] | None:
    """Return the shape of ``module(x, ...)`` without computing it, or None if that is impossible.

    A copy runs whose parameters, buffers and inputs are on the meta device. Statistics, counters,
    hooks and random numbers of the module itself are not touched.
    """

    def to_meta(t: Tensor) -> Tensor:
        # One dtype for all: autocast, which would convert them, does not support the meta device.
        dtype = torch.float32 if t.is_floating_point() else t.dtype
        return torch.empty_like(t, device="meta", dtype=dtype)

    def all_to_meta(value: Any) -> Any:
        return tree_map_only(Tensor, to_meta, value)

    try:
        memo: dict[int, Any] = {}
        for p in module.parameters():
            memo[id(p)] = nn.Parameter(to_meta(p), requires_grad=False)
        for b in module.buffers():
            memo[id(b)] = to_meta(b)
        twin = copy.deepcopy(module, memo)
        for part in twin.modules():
            clear_forward_hooks(part)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = twin(*all_to_meta((x, *args)), **all_to_meta(kwargs or {}))
    except Exception:  # a module may raise anything for a tensor without values
        return None
    return tuple(out.shape) if isinstance(out, Tensor) else None


def _copy_of_first_conv(module: nn.Module) -> nn.Module:
    """Return a deep copy of the first convolution, if its output has the shape of the module's."""
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
        "pass a projection that does: nn.Conv2d(...) with the right channels and stride, or the "
        "shortcut that the stage already has (layer[0].downsample in torchvision's ResNets)"
    )
    size = (64,) * len(conv.kernel_size)
    probe = torch.empty(2, conv.in_channels, *size, device="meta", dtype=conv.weight.dtype)
    ours, theirs = _output_shape_of(conv, probe), _output_shape_of(module, probe)
    if ours is not None and theirs is not None:
        if ours != theirs:
            raise ValueError(
                f"projection='copy' does not fit: on an input of shape {tuple(probe.shape)} the "
                f"first convolution, {name!r}, gives {ours}, but the module gives {theirs}; "
                f"{advice}"
            )
        return copy.deepcopy(conv)
    # The module cannot run on tensors without values: compare the channels of its last layer.
    declared = [
        getattr(m, "out_channels", None) or getattr(m, "num_features", None)
        for m in module.modules()
    ]
    channels = next((c for c in reversed(declared) if isinstance(c, int)), conv.out_channels)
    if channels != conv.out_channels:
        raise ValueError(
            f"projection='copy' does not fit: the first convolution, {name!r}, gives "
            f"{conv.out_channels} channels, but the module seems to give {channels}; {advice}"
        )
    return copy.deepcopy(conv)


class StochasticDepth(LayerWithRate):
    """Skip a module at random while training: a dropped module is not computed.

    The module ``m`` is replaced by ``s(x) = x``, or by ``s(x) = projection(x)`` if ``m`` changes
    the shape:

    =======  =======================  ===========================  ==========================
    scale    training, dropped (p)    training, kept (1 - p)       evaluation
    =======  =======================  ===========================  ==========================
    "train"  ``s(x)``                 ``s + (m(x) - s) / (1-p)``   ``m(x)``
    "eval"   ``s(x)``                 ``m(x)``                     ``(1-p) m(x) + p s(x)``
    "none"   ``s(x)``                 ``m(x)``                     ``m(x)``
    =======  =======================  ===========================  ==========================

    ``m`` is a whole block or stage with its skip connection, so that ``m(x) - s`` is its residual
    branch. "train" keeps the mean of the output, "eval" is the rule of the paper, and "none" is
    LayerDrop. Where the factor is 1, the output is ``m(x)`` itself, without rounding.

    Wrapping renames the keys of a state dict, ``layer1.0.conv1.weight`` becomes
    ``layer1.module.0.conv1.weight``: load weights first, wrap afterwards.
    (:func:`torchdrop.add_stochastic_depth` drops branches of a model and renames nothing.)

    Example:
        >>> model = torchvision.models.resnet18(weights="DEFAULT")
        >>> model.layer1 = StochasticDepth(model.layer1, 0.2)
        >>> model.layer2 = StochasticDepth(model.layer2, 0.2, projection="copy")
        >>> model.layer3 = StochasticDepth(model.layer3, 0.2, model.layer3[0].downsample)
        >>> model.layer4 = StochasticDepth(model.layer4, 0.2, nn.Conv2d(256, 512, 1, stride=2))

    Decisions are drawn on the host, from torch's global CPU generator: ``torch.manual_seed`` makes
    them reproducible, and activation checkpointing repeats them. In a process group, all ranks
    draw the same decisions with ``mode="batch"`` (see ``sync_ranks``), and their own rows with
    "row". ``torch.compile`` breaks the graph at the decision, which determines what runs. If ranks
    wait for each other inside the module (SyncBatchNorm, ``fully_shard``), it is not skipped: it
    runs in full and is masked.

    Args:
        module: The module m. Its first argument and its result are tensors; further arguments are
            passed on to it.
        p: The probability of dropping, in [0, 1]; can be set later. With 1, the module never runs
            while training; with 0, the layer only calls the module.
        projection: What replaces a dropped module. ``None``: x itself. A module: it may be new,
            and is trained with the rest, or a part of ``module`` (whose keys are then in the state
            dict twice and its parameters once; a BatchNorm in it sees kept batches twice).
            ``"copy"``: a copy of the first convolution in ``module``, weights included, if its
            output has the shape of the module's.
        mode: ``"batch"``: one decision for each call (the paper). ``"row"``: one for each sample;
            the module runs on the kept rows, a uniformly random subset whose mean size is exactly
            ``(1-p) * batch``. The further arguments must then not contain tensors, because the
            layer cannot know whether to take the kept rows of them too.
        scale: ``"train"``, ``"eval"`` or ``"none"``, see the table.
        batch_dim: The dimension that counts samples, for ``mode="row"``.
        sync_ranks: Whether all ranks of a process group draw the same decisions with
            ``mode="batch"``. If they do not, each step takes as long as the rank that keeps most.
            None means True.
        zero_grad: Whether parameters that were not used, of the module or of a projection, get
            gradients of zero, which DistributedDataParallel waits for. False leaves them None.

    Shape:
        ``m(x)`` and ``s(x)`` need the same shape. It is compared whenever both are computed, and
        otherwise once for each input shape, by running a copy of the one that was not computed on
        the meta device, which computes no values and changes no state.

    In training with p > 0, the output has the dtype of ``x`` for every decision, although under
    autocast ``s(x)`` and ``m(x)`` may have other dtypes. With p = 0, and in evaluation unless
    ``scale`` is "eval", ``m(x)`` is returned unchanged.

    Raises:
        TypeError: ``module`` is not an nn.Module, ``projection`` is none of the above, or ``p`` is
            not a real number. In a call: the input is not a floating-point tensor, or the output
            is not a tensor.
        ValueError: ``p``, ``mode`` or ``scale`` is out of range, or ``projection="copy"`` does not
            fit. In a call: the shapes do not agree, or ``mode="row"`` got further tensors.
        RuntimeError: ``module`` changes its input in place, which the skip needs too.

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
        check_choice(scale, SCALES, "scale")
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
        self.gives_zero_grads = zero_grad  # not zero_grad, a method of nn.Module
        self._checked_shapes: set[tuple[int, ...]] = set()
        # Set the flag only: train() would also change a BatchNorm that is frozen in the module.
        self.training = module.training

    def extra_repr(self) -> str:
        """Return the rate, the mode, the scale, and what differs from the defaults."""
        text = f"p={self.p}, mode={self.mode!r}, scale={self.scale!r}"
        if self.batch_dim != 0:
            text += f", batch_dim={self.batch_dim}"
        if self.sync_ranks is not None:
            text += f", sync_ranks={self.sync_ranks}"
        return text if self.gives_zero_grads else text + ", zero_grad=False"

    def forward(self, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``m(x)``, ``s(x)`` or a mixture of both, as in the table of the class."""
        node = fx_node_of_call(self, (x, *args), kwargs)
        if node is not None:
            return node
        check_input(x)
        if self.p == 0.0 or (not self.training and self.scale != "eval"):
            return self._run_without_skip(x, args, kwargs)
        if not self.training:
            return self._expectation(x, args, kwargs)
        refuse_graph_capture(x)
        together = self.mode == "batch" and self.sync_ranks is not False
        if find_communicating_module(
            [self.module], type(self.module).__name__, same_on_all_ranks=together
        ):
            out = self._mask_rows(x, args, kwargs)
        elif self.mode == "row":
            out = self._drop_rows(x, args, kwargs)
        elif keep_batch(self.p, self.sync_ranks):
            out = self._keep(x, args, kwargs)
        else:
            out = self._drop(x, args, kwargs)
        # Under autocast the dtypes of s(x) and m(x) may differ, and that of a dropped m(x) is not
        # known.
        return out.to(x.dtype)

    def _drop_rows(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if any(True for _ in _tensors((args, kwargs))):
            raise ValueError(
                "with mode='row' the module takes one tensor only, because the layer cannot know "
                "whether to take the kept rows of another one; use mode='batch', or "
                "torchdrop.add_stochastic_depth, which finds it out"
            )
        dim = check_dim(self.batch_dim, x.dim())
        batch = x.shape[dim]
        kept = keep_rows(batch, self.p)
        if len(kept) == 0:
            return self._drop(x, args, kwargs)
        if len(kept) == batch:
            return self._keep(x, args, kwargs)
        index = kept.to(x.device, non_blocking=True)
        part = take(x, index, dim)
        skip = self._skip(x)
        part_skip = part if skip is x else take(skip, index, dim)
        out = self._run(part, args, kwargs)
        self._check_same_shape(x, tuple(part_skip.shape), tuple(out.shape), tuple(part.shape))
        if self.scale == "train":
            out = _scale_residual(part_skip, out, 1.0 - self.p)
        # Not index_copy, whose result is contiguous: clone keeps channels_last.
        return skip.clone().index_copy_(dim, index, out.to(skip.dtype))

    def _mask_rows(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the module in full, since other ranks wait inside it, and replace dropped rows."""
        dim = check_dim(self.batch_dim, x.dim())
        kept = torch.zeros(x.shape[dim], dtype=torch.bool, device="cpu")
        if self.mode == "row":
            kept[keep_rows(x.shape[dim], self.p)] = True
        else:
            kept.fill_(keep_batch(self.p, self.sync_ranks))
        skip = self._skip(x)
        out = self._run(x, args, kwargs)
        self._check_same_shape(x, tuple(skip.shape), tuple(out.shape))
        if self.scale == "train":
            out = _scale_residual(skip, out, 1.0 - self.p) if self.p < 1.0 else out
        kept = along_dim(kept.to(x.device, non_blocking=True), dim, x.dim())
        return torch.where(kept, out, skip)

    def _keep(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.scale != "train":
            return self._run_without_skip(x, args, kwargs)
        skip = self._skip(x)
        out = self._run(x, args, kwargs)
        self._check_same_shape(x, tuple(skip.shape), tuple(out.shape))
        return _scale_residual(skip, out, 1.0 - self.p)

    def _drop(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return s(x) as a new tensor, so that a later in-place activation does not change x."""
        skip = self._skip(x)
        if self._shape_is_unchecked(x):
            self._check_same_shape(
                x, tuple(skip.shape), _output_shape_of(self.module, x, args, kwargs)
            )
        if self.gives_zero_grads:
            return with_zero_grads(skip, self.module.parameters())
        return skip.clone() if skip is x else skip

    def _run_without_skip(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return m(x). s(x) is not computed; its shape is compared once."""
        skip: tuple[int, ...] | None = tuple(x.shape)
        if self.projection is not None:
            skip = _output_shape_of(self.projection, x) if self._shape_is_unchecked(x) else None
        out = self._run(x, args, kwargs, may_write=True)
        self._check_same_shape(x, skip, tuple(out.shape))
        if self.training and self.gives_zero_grads and self.projection is not None:
            out = with_zero_grads(out, self.projection.parameters())  # it did not run
        return out

    def _expectation(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return (1-p) m(x) + p s(x), the mean of the output in training."""
        if self.p == 1.0:  # 0 * m(x) would be NaN where m, which was never trained, gives inf
            return self._drop(x, args, kwargs)
        skip = self._skip(x)
        out = self._run(x, args, kwargs)
        self._check_same_shape(x, tuple(skip.shape), tuple(out.shape))
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
        version = modifications_of(x) if watch else 0
        out = self.module(x, *args, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(
                "the module of StochasticDepth has to return a tensor, but "
                f"{type(self.module).__name__} returned {type(out).__name__}"
            )
        if watch and modifications_of(x) != version:
            raise RuntimeError(
                f"the module must not change its input, which the skip needs too, but "
                f"{type(self.module).__name__} changed it in place; give its first activation "
                "inplace=False"
            )
        return out

    def _shape_is_unchecked(self, x: Tensor) -> bool:
        """Whether shapes have not been compared for inputs of this shape, batch size aside."""
        return (
            not torch.compiler.is_compiling()
            and self._shape_of_sample(x) not in self._checked_shapes
        )

    def _shape_of_sample(self, x: Tensor) -> tuple[int, ...]:
        shape = list(x.shape)
        del shape[check_dim(self.batch_dim, x.dim())]
        return tuple(shape)

    def _check_same_shape(
        self,
        x: Tensor,
        skip: tuple[int, ...] | None,
        out: tuple[int, ...] | None,
        seen: tuple[int, ...] | None = None,
    ) -> None:
        """Raise unless s(x) and m(x) have the same shape; None is a shape that is not known."""
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
