"""What is compared: the registry of methods, and how each one changes a network.

To add a method, write a function that builds it and register it with one line of summary and a
default ``p`` that was measured (docs/development/design-notes.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as _NeverCalled

import torchdrop
from torchdrop import functional, schedules
from torchdrop.finding.residual import Branch, Residual
from torchdrop.schedules import check_rate

from ..errors import UserError, one_line
from ..models import FractalNet

__all__ = ["METHODS", "Applied", "Method", "rates", "register"]


class Applied:
    """A method at work on one network: what training has to know of it.

    The base class is the method that does nothing.
    """

    asked: float | None = None
    """The mean drop rate that was asked for, or None where nothing is dropped."""

    @property
    def reached(self) -> bool:
        """Whether the network, once trained a step, came by where the method is at work."""
        return True

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The batch to train on in place of the one that came. Called in training only."""
        return images, labels

    def observed(self) -> float | None:
        """The drop rate that training really delivered since the last call."""
        return None


Build = Callable[[nn.Module, float], Applied]


@dataclass(frozen=True)
class Method:
    """A way to regularise.

    Attributes:
        name: What the user types.
        summary: One line on what it does.
        build: Changes a network in place, given ``p``.
        p: The default of ``p``. None: it has none, or it follows another method.
        rate: Whether ``p`` is a probability, which one ``--p`` for all methods sets. Else it is
            another number in [0, 1], which only an entry for this method sets.
        costs_like: The method whose FLOPs it is to have: ``p`` is then measured, 1 - FLOPs of that
            method / FLOPs of ``none``, unless the user gives it by name.
    """

    name: str
    summary: str
    build: Build
    p: float | None = None
    rate: bool = True
    costs_like: str | None = None


METHODS: dict[str, Method] = {}
"""All methods, in the order of the table."""


def register(method: Method) -> None:
    """Add a method to :data:`METHODS`."""
    if method.name in METHODS:
        raise ValueError(f"there is a method {method.name!r} already")
    METHODS[method.name] = method


def rates(
    methods: Sequence[str], given: Sequence[str], defaults: Mapping[str, float] | None = None
) -> dict[str, float | None]:
    """The ``p`` of each method: what was given for it, else for all, else its default.

    Args:
        methods: Names of methods.
        given: What the user typed: ``"0.3"`` for all methods, ``"dropout=0.3"`` for one.
        defaults: Defaults that go before the methods' own.

    Returns:
        ``p`` by method; None where there is none, or where it is to be measured.

    Raises:
        UserError: An entry that names no method of ``methods``, or no probability.
    """
    general: float | None = None
    single: dict[str, float] = {}
    for entry in given:
        name, equals, number = entry.rpartition("=")
        if equals and name not in methods:
            raise UserError(
                f"--p {entry}: {name!r} is not among the methods compared: {', '.join(methods)}"
            )
        if equals and name == "none":
            raise UserError(f"--p {entry}: the method 'none' has no p")
        try:
            p = check_rate(float(number), "p")
        except ValueError as error:
            raise UserError(
                f"--p {entry}: p has to be a number between 0 and 1, "
                f"as in --p 0.3 or --p dropout=0.3"
            ) from error
        if equals:
            single[name] = p
        else:
            general = p
    result: dict[str, float | None] = {}
    for name in methods:
        default = (defaults or {}).get(name, METHODS[name].p)
        if default is not None and general is not None and METHODS[name].rate:
            default = general
        result[name] = single.get(name, default)
    return result


def _none(model: nn.Module, p: float) -> Applied:
    return Applied()


class _Hook:
    """A method at one place of a network: a hook, so that all parameters keep their names.

    As a hook before a module it changes what the module is given, as one behind it what it gives.
    It counts what it drops, where the activations are: reading the numbers here would wait for the
    device.

    Args:
        change: Called with a tensor and ``training=``; gives the tensor to go on with.
        count: Gives, of the tensor before and after, how many there are and how many were dropped;
            None where nothing is.
    """

    def __init__(
        self,
        name: str,
        change: Callable[..., Tensor],
        count: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> None:
        self.name = name
        self.change = change
        self.count = count
        self.calls = 0
        self.counts: Tensor | None = None

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], output: Any = None
    ) -> Tensor | tuple[Any, ...] | None:
        before = output is None
        x = inputs[0] if before else output
        if not isinstance(x, Tensor):
            raise UserError(
                f"{self.name} changes what a {type(module).__name__} gives, which has to be a "
                f"tensor, but it is a {type(x).__name__}; leave {self.name} out of --methods"
            )
        new = self.change(x, training=module.training)
        if module.training:
            self.calls += 1
            if self.count is not None:
                counts = torch.stack(self.count(x.detach(), new.detach()))
                self.counts = counts if self.counts is None else self.counts + counts
        return (new, *inputs[1:]) if before else new

    def observed(self) -> float | None:
        seen, dropped = (0, 0) if self.counts is None else self.counts.tolist()
        self.counts = None
        return dropped / seen if seen else None


def _zeroed(x: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Values that were not zero before, and those of them that are after."""
    seen = torch.count_nonzero(x)
    return seen, seen - torch.count_nonzero(new)


def _shaken(x: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that hold anything, and those of them that are not what they were."""
    seen = torch.count_nonzero(x.flatten(1).any(1))
    return seen, torch.count_nonzero((x != new).flatten(1).any(1))


class _Placed(Applied):
    """A method at work at some places, by hooks."""

    def __init__(self, asked: float | None, hooks: Sequence[_Hook]) -> None:
        self.asked = asked
        self.hooks = list(hooks)

    @property
    def reached(self) -> bool:
        return any(hook.calls for hook in self.hooks)

    def observed(self) -> float | None:
        rates = [rate for hook in self.hooks if (rate := hook.observed()) is not None]
        return fmean(rates) if rates else None


def _drop_elements(x: Tensor, p: float, training: bool) -> Tensor:
    return F.dropout(x, p, training)


def _dropout(model: nn.Module, p: float) -> Applied:
    # The projection inside nn.MultiheadAttention is a Linear that is never called.
    linears = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and not isinstance(module, _NeverCalled)
    ]
    if not linears:
        raise UserError(
            "dropout goes in front of the last nn.Linear of a network, and this one has none; "
            "leave dropout out of --methods"
        )
    hook = _Hook("dropout", partial(_drop_elements, p=p), _zeroed)
    linears[-1].register_forward_pre_hook(hook)
    return _Placed(p, [hook])


def _dropout_at_bn(model: nn.Module, p: float, name: str, before: bool) -> Applied:
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise UserError(
            f"{name} goes next to the last BatchNorm of a network, and this one has none; "
            f"leave {name} out of --methods"
        )
    hook = _Hook(name, partial(_drop_elements, p=p), _zeroed)
    if before:
        norms[-1].register_forward_pre_hook(hook)
    else:
        norms[-1].register_forward_hook(hook)
    return _Placed(p, [hook])


def _dropout_before_bn(model: nn.Module, p: float) -> Applied:
    return _dropout_at_bn(model, p, "dropout_before_bn", before=True)


def _dropout_after_bn(model: nn.Module, p: float) -> Applied:
    return _dropout_at_bn(model, p, "dropout_after_bn", before=False)


# What acts on the outputs of residual blocks


_CONVOLUTIONS = (_BatchNorm, nn.modules.conv._ConvNd)
"""Modules that say that dimension 1 counts channels; without any it is the last, as for tokens."""


def _residuals(model: nn.Module, name: str) -> list[Residual]:
    found = torchdrop.find_residuals(model)
    if not found:
        raise UserError(
            f"{name} goes to the residual blocks of a network, and this one has none that "
            f"torchdrop.find_residuals finds; leave {name} out of --methods"
        )
    return found


def _deeper_half(model: nn.Module, name: str) -> list[nn.Module]:
    """The residual blocks of the deeper half; of an odd number, the one in the middle too."""
    blocks = _residuals(model, name)
    return list(dict.fromkeys(block.module for block in blocks[len(blocks) // 2 :]))


def _holds_convolution(block: nn.Module) -> bool:
    return any(isinstance(module, _CONVOLUTIONS) for module in block.modules())


def _behind(
    blocks: Sequence[nn.Module],
    name: str,
    change: Callable[[nn.Module], Callable[..., Tensor]],
    asked: float | None,
) -> Applied:
    """Change the output of each block by what ``change`` gives for it."""
    count = None if asked is None else _zeroed
    hooks = [_Hook(name, change(block), count) for block in blocks]
    for block, hook in zip(blocks, hooks, strict=True):
        block.register_forward_hook(hook)
    return _Placed(asked, hooks)


_LARGEST_BLOCK = 7
"""Of DropBlock, in units of a map: the paper's, for maps of 14x14."""


def _drop_blocks(x: Tensor, p: float, training: bool) -> Tensor:
    """DropBlock with blocks of half a map and one unit, 7 at most."""
    if not 3 <= x.dim() <= 5:
        raise UserError(
            f"drop_block needs maps, (batch, channels, height, width), behind residual blocks, "
            f"but got {tuple(x.shape)}; leave drop_block out of --methods"
        )
    size = tuple(min(side // 2 + 1, _LARGEST_BLOCK) for side in x.shape[2:])
    drop = (functional.drop_block1d, functional.drop_block2d, functional.drop_block3d)[x.dim() - 3]
    return drop(x, p, size, training)


def _drop_block(model: nn.Module, p: float) -> Applied:
    blocks = [block for block in _deeper_half(model, "drop_block") if _holds_convolution(block)]
    if not blocks:
        raise UserError(
            "drop_block goes behind residual blocks with a convolution, and this network has none "
            "in its deeper half; leave drop_block out of --methods"
        )
    return _behind(blocks, "drop_block", lambda block: partial(_drop_blocks, p=p), p)


def _spatial_dropout(model: nn.Module, p: float) -> Applied:
    def change(block: nn.Module) -> Callable[..., Tensor]:
        dim = 1 if _holds_convolution(block) else -1
        return partial(functional.spatial_dropout, p=p, channel_dim=dim)

    return _behind(_deeper_half(model, "spatial_dropout"), "spatial_dropout", change, p)


def _gaussian_dropout(model: nn.Module, p: float) -> Applied:
    try:
        functional.gaussian_dropout(torch.zeros(1), p)
    except ValueError as error:
        raise UserError(f"gaussian_dropout: {one_line(error)}") from error
    blocks = _deeper_half(model, "gaussian_dropout")
    change = partial(functional.gaussian_dropout, p=p)
    return _behind(blocks, "gaussian_dropout", lambda block: change, None)


def _uniform_dropout(model: nn.Module, p: float) -> Applied:
    blocks = _deeper_half(model, "uniform_dropout")
    change = partial(functional.uniform_dropout, beta=p)
    return _behind(blocks, "uniform_dropout", lambda block: change, None)


# What acts on residual branches


def _last_module(model: nn.Module, branch: Branch) -> nn.Module | None:
    """The module whose output is what a branch adds; None where that is no module's alone."""
    split = branch._split
    if split is None or split.branch.op != "call_module":
        return None
    target = str(split.branch.target)
    calls = [n for n in split.branch.graph.nodes if n.op == "call_module" and n.target == target]
    # A layer that is called twice would be changed twice.
    paths = [c for c in branch.children if c == target or c.endswith(f".{target}")]
    return model.get_submodule(paths[-1]) if len(calls) == 1 and paths else None


def _shake_drop(model: nn.Module, p: float) -> Applied:
    blocks = _residuals(model, "shake_drop")
    rates = schedules.linear(p, len(blocks))
    places: dict[nn.Module, float] = {}
    for block, rate in zip(blocks, rates, strict=True):
        for branch in block.branches:
            module = _last_module(model, branch)
            if module is None or module in places:
                raise UserError(
                    f"shake_drop multiplies the output of a residual branch, and that of "
                    f"{branch.name} is no module's own; leave shake_drop out of --methods"
                )
            places[module] = rate
    hooks = []
    for module, rate in places.items():
        hooks.append(_Hook("shake_drop", partial(functional.shake_drop, p=rate), _shaken))
        module.register_forward_hook(hooks[-1])
    return _Placed(fmean(places.values()), hooks)


class _PlanApplied(Applied):
    def __init__(self, plan: Any) -> None:
        self.plan = plan
        self.asked = fmean(block.p for block in plan.blocks)

    def observed(self) -> float | None:
        delivered: Mapping[str, float] = self.plan.observed()
        return fmean(delivered.values()) if delivered else None


def _stochastic_depth(model: nn.Module, p: float, **options: Any) -> Applied:
    try:
        plan = torchdrop.add_stochastic_depth(model, p, schedule="linear", **options)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    return _PlanApplied(plan)


def _drop_path(model: nn.Module, p: float) -> Applied:
    return _stochastic_depth(model, p, mode="row", sampling="independent", compute="mask")


def _stochastic_depth_row(model: nn.Module, p: float) -> Applied:
    return _stochastic_depth(model, p, mode="row", sampling="exact")


def _stochastic_depth_batch(model: nn.Module, p: float) -> Applied:
    return _stochastic_depth(model, p, mode="batch", scale="eval")


class _Subsample(Applied):
    """Trains on a random subset of each batch, of a size rounded at random to the exact mean."""

    def __init__(self, p: float) -> None:
        self.asked = p
        self.seen = 0
        self.kept = 0

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(labels)
        index = torch.randperm(batch)[: self._size(batch)]
        self.seen += batch
        self.kept += len(index)
        index = index.to(labels.device)
        return images[index], labels[index]

    def _size(self, batch: int) -> int:
        wanted = batch * (1.0 - float(self.asked or 0.0))
        # BatchNorm may not take a single image: below two, it is two of them or none at all.
        smallest = min(2, batch)
        if wanted < smallest:
            return smallest * int(float(torch.rand((), dtype=torch.float64)) < wanted / smallest)
        whole = int(wanted)
        return whole + int(float(torch.rand((), dtype=torch.float64)) < wanted - whole)

    def observed(self) -> float | None:
        seen, kept = self.seen, self.kept
        self.seen = self.kept = 0
        return 1.0 - kept / seen if seen else None


def _subsample(model: nn.Module, p: float) -> Applied:
    return _Subsample(p)


_HOLE = 0.5
"""The side of a hole of Cutout over that of the image: the paper's 16 of 32 on CIFAR-10."""


class _Cutout(Applied):
    """Holes in the images of a batch, every sample its own, filled with the mean colour.

    The images come normalised, so that the mean is 0. Counts the samples that have a hole.
    """

    def __init__(self, p: float) -> None:
        self.asked = p
        self.seen = 0
        self.cut: Tensor | None = None

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        new, boxes = functional.cutout(images, _HOLE, p=self.asked or 0.0, return_boxes=True)
        cut = torch.count_nonzero(boxes.any(-1).any(-1))
        self.seen += len(images)
        self.cut = cut if self.cut is None else self.cut + cut
        return new, labels

    def observed(self) -> float | None:
        seen, cut = self.seen, self.cut
        self.seen, self.cut = 0, None
        return int(cut) / seen if seen and cut is not None else None


def _cutout(model: nn.Module, p: float) -> Applied:
    return _Cutout(p)


class _Joins(Applied):
    """Drop-path at the joins of a FractalNet; counts the inputs of joins that are dropped."""

    def __init__(self, net: FractalNet, p: float) -> None:
        net.p = p
        self.net = net
        self.asked = net.asked()

    def observed(self) -> float | None:
        return self.net.observed()


def _path_drop(model: nn.Module, p: float) -> Applied:
    if not isinstance(model, FractalNet):
        raise UserError(
            "path_drop drops inputs of the joins of a FractalNet; give --model fractalnet, or "
            "leave path_drop out of --methods"
        )
    return _Joins(model, p)


register(Method("none", "the network as it is", _none))
register(Method("dropout", "nn.Dropout in front of the last linear layer", _dropout, p=0.3))
register(
    Method(
        "drop_path",
        "each sample drops its own branches by a mask: every branch is computed in full",
        _drop_path,
        p=0.5,
    )
)
register(
    Method(
        "stochastic_depth_row",
        "each sample drops its own branches, and only what is kept is computed",
        _stochastic_depth_row,
        p=0.5,
    )
)
register(
    Method(
        "stochastic_depth_batch",
        "the whole batch drops a branch, as in the paper",
        _stochastic_depth_batch,
        p=0.5,
    )
)
register(
    Method(
        "subsample",
        "control: leaves out whole samples, to the FLOPs of stochastic_depth_row",
        _subsample,
        costs_like="stochastic_depth_row",
    )
)
register(
    Method(
        "dropout_before_bn",
        "nn.Dropout in front of the last BatchNorm",
        _dropout_before_bn,
        p=0.3,
    )
)
register(
    Method(
        "dropout_after_bn",
        "nn.Dropout behind the last BatchNorm",
        _dropout_after_bn,
        p=0.3,
    )
)
register(
    Method(
        "drop_block",
        "DropBlock behind the residual blocks of the deeper half: blocks of half a map and one",
        _drop_block,
        p=0.1,
    )
)
register(
    Method(
        "spatial_dropout",
        "whole channels, behind the residual blocks of the deeper half",
        _spatial_dropout,
        p=0.1,
    )
)
register(
    Method(
        "gaussian_dropout",
        "noise with the variance of dropout, behind the residual blocks of the deeper half",
        _gaussian_dropout,
        p=0.1,
    )
)
register(
    Method(
        "uniform_dropout",
        "uniform noise of half-width beta (its p), behind the residual blocks of the deeper half",
        _uniform_dropout,
        p=0.1,
        rate=False,
    )
)
register(
    Method(
        "shake_drop",
        "residual branches times one random factor forward and another one backward, per sample",
        _shake_drop,
        p=0.5,
    )
)
register(
    Method(
        "cutout",
        "augmentation: a hole of half the side in each training image, every sample its own",
        _cutout,
        p=1.0,
    )
)
register(
    Method(
        "path_drop",
        "drop-path of FractalNet, half of the samples local and half global (--model fractalnet)",
        _path_drop,
        p=0.15,
    )
)
