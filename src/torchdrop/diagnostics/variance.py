"""Measure how much the variance of activations differs between training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from torchdrop.checks import check_model
from torchdrop.diagnostics.batches import Call, calls, check_batches, check_sizes_known
from torchdrop.diagnostics.shift import LayerShift, VarianceShift
from torchdrop.diagnostics.untouched import untouched
from torchdrop.finding.example_calls import Example
from torchdrop.finding.survey import survey
from torchdrop.internals import BatchNormBase, ConvBase, tree_map_only
from torchdrop.running.block_site import sites_of
from torchdrop.running.observed_sums import ObservedSums
from torchdrop.running.observers import SumEvent
from torchdrop.running.split_site import SplitSite
from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["variance_shift"]

# In a block with a module of these types, dimension 1 is the channels.
_CHANNELS_FIRST = (BatchNormBase, ConvBase)


# ---------------------------------------------------------------------------------------------
# Moments


class Moments:
    """Mean and sums of squared deviations per channel over several batches, in float64.

    Batches are merged by the formulas of Chan, Golub and LeVeque, which are numerically stable:
    they do not subtract large numbers from each other.

    Attributes:
        count: The number of values of each channel.
        mean: Their mean.
        total: The sum of their squared deviations from ``mean``.
        within: The sum of their squared deviations from the mean of their own batch.
        freedom: The degrees of freedom of ``within``: ``count`` minus the number of batches.
    """

    def __init__(self) -> None:
        self.count = 0
        self.freedom = 0
        self.mean = torch.zeros(())
        self.total = torch.zeros(())
        self.within = torch.zeros(())

    def add(self, x: Tensor, channel_dim: int) -> None:
        """Add one batch.

        Raises:
            ValueError: The number of channels differs from that of earlier batches.
        """
        if x.numel() == 0:
            return
        channels = x.shape[channel_dim]
        if self.count and channels != self.mean.numel():
            raise ValueError(f"{self.mean.numel()} channels before, now {channels}")
        if x.device.type == "mps":  # MPS has no float64
            x = x.cpu()
        values = x.detach().to(torch.float64).movedim(channel_dim, 0).flatten(1)
        if values.dim() == 1:  # one value for each channel
            values = values.unsqueeze(1)
        count = values.shape[1]
        variance, mean = torch.var_mean(values, 1, correction=0)
        squares = variance * count
        if not self.count:
            self.mean = torch.zeros_like(mean)
            self.total, self.within = self.mean.clone(), self.mean.clone()
        joined = self.count + count
        step = mean - self.mean
        self.total += squares + step**2 * (self.count * count / joined)
        self.mean += step * (count / joined)
        self.count = joined
        self.within += squares
        self.freedom += count - 1

    def variances(self) -> tuple[Tensor, Tensor]:
        """Return the variances per channel within batches, and of all values; NaN without any."""
        nothing = torch.full_like(self.mean, math.nan, dtype=torch.float64)
        within = self.within / self.freedom if self.freedom else nothing
        total = self.total / self.count if self.count else nothing
        return within, total


# ---------------------------------------------------------------------------------------------
# The sums to observe


class _Probe:
    """Accumulates mean and variance of the values at each layer, in training and in evaluation.

    Attributes:
        training: Whether the current forward pass is in training.
        moments: The :class:`Moments` of each layer, by its kind and name, and by ``training``.
        unreadable: Why sums could not be observed, by the path of the module that adds them.
    """

    def __init__(self) -> None:
        self.training = False
        self.moments: dict[tuple[str, str], dict[bool, Moments]] = {}
        self.unreadable: dict[str, str] = {}

    def note(self, kind: str, name: str, x: Tensor, channel_dim: int) -> None:
        """Add ``x``, the values at one layer in the current pass, to the moments of the layer."""
        by_training = self.moments.setdefault((kind, name), {False: Moments(), True: Moments()})
        if x.dim() == 0:
            x = x.unsqueeze(0)
        if not -x.dim() <= channel_dim < x.dim():
            raise ValueError(
                f"{name} has {x.dim()} dimensions, so channel_dim cannot be {channel_dim}; give "
                f"one from {-x.dim()} to {x.dim() - 1}"
            )
        try:
            by_training[self.training].add(x, channel_dim)
        except ValueError as error:
            raise ValueError(
                f"the channels of {name} are not on dimension {channel_dim} ({error}); "
                "give channel_dim"
            ) from None

    def observe(self, path: str, module: nn.Module, sums: list[_Sum]) -> ObservedSums:
        """Return a context in which the residual sums of ``module`` are added to the moments."""

        def note_sum(event: SumEvent) -> None:
            observed = sums[event.index]
            self.note("residual_sum", observed.name, event.total, observed.channel_dim)

        def note_unreadable(error: UntraceableError) -> None:
            self.unreadable.setdefault(path, str(error))

        return ObservedSums(module, [s.order for s in sums], note_sum, note_unreadable)


@dataclass
class _Sum:
    """One residual sum: its number in the forward, its name, and the dimension of its channels."""

    order: int
    name: str
    channel_dim: int


def _channel_dim(block: nn.Module, asked: int | None) -> int:
    """Return ``asked``, or for None the channel dimension that the layers of ``block`` suggest."""
    if asked is not None:
        return asked
    return 1 if any(isinstance(m, _CHANNELS_FIRST) for m in block.modules()) else -1


def _residual_sums(
    model: nn.Module, example: Callable[[], Any], channel_dim: int | None
) -> tuple[dict[str, list[_Sum]], dict[str, str]]:
    """Find the residual sums to observe.

    Returns:
        The sums, and why other sums cannot be observed, both by the path of the adding module.
    """
    paths = {module: path for path, module in reversed(list(model.named_modules()))}
    sums: dict[str, list[_Sum]] = {}
    unreadable: dict[str, str] = {}
    # In modules to which stochastic depth is attached: the sums whose branches it drops.
    for site in sites_of(model):
        path = paths[site.module]
        if not isinstance(site, SplitSite):
            unreadable[path] = f"it is {site.branches[0].reason}"
            continue
        sums[path] = [
            _Sum(
                order,
                branch.facts.name,
                _channel_dim(_block(site.module, branch.facts.path), channel_dim),
            )
            for order, branch in zip(site.orders, site.branches, strict=True)
        ]
    # In all other modules: the sums that find_residuals takes by default. An example is used only
    # if a forward cannot be read without it.
    attached = {*sums, *unreadable}
    found = survey(model)
    if set(found.unreadable) - attached:
        found = survey(model, Example(model, example()))
    for residual in found.residuals:
        dim = _channel_dim(residual.module, channel_dim)
        for branch in residual.branches if residual.default else ():
            source = branch.source
            if source.owner in attached:
                continue
            if "forward" in model.get_submodule(source.owner).__dict__:
                unreadable[source.owner] = "its forward was replaced on the instance"
            elif source.split is None or source.graph is None or source.graph.inlined:
                unreadable[source.owner] = "its sum cannot be separated from the rest of it"
            else:
                known = sums.setdefault(source.owner, [])
                known.append(_Sum(source.split.order, branch.name, dim))
    unreadable.update({k: v for k, v in found.unreadable.items() if k not in attached})
    return sums, unreadable


def _block(owner: nn.Module, path: str | None) -> nn.Module:
    """Return the block of a sum in the forward of ``owner``: an element of a list, or the owner."""
    return owner.get_submodule(path) if path else owner


# ---------------------------------------------------------------------------------------------
# The measurement


def variance_shift(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    repeats: int = 4,
    channel_dim: int | None = None,
) -> VarianceShift:
    """Compare the variance at each BatchNorm and residual sum in training and in evaluation.

    For the input x of every BatchNorm, and for every residual sum ``x = s + f(s)``::

        ratio = mean over channels c of  V_train[c] / V_eval[c]

    where V is the variance within batches, which BatchNorm accumulates in its running variance;
    :class:`LayerShift` has the equations, and also reports T, the variance of all draws together. A
    ratio of 1 means that running statistics fit evaluation; a ratio of 2 means that BatchNorm
    divides by a standard deviation 1.4 times too large in evaluation.

    *Training* is a forward pass with every layer in training mode: drops are on, and each BatchNorm
    normalises with the statistics of its batch, so that the ratio of a layer shows what earlier
    BatchNorms did not remove. It is run ``repeats`` times per batch, with new random numbers.
    *Evaluation* is one pass of the same batch after ``model.eval()``: drops are off, and each
    BatchNorm normalises with its current running statistics, so the ratio describes the network
    that will be evaluated. Statistics that do not fit (of a network that was hardly trained) change
    the variance of the layers that follow: run :func:`recalibrate_batch_norm` first if you are
    interested in the effect of the drops alone. If the model is given in training mode, the
    training flags of its modules are used as they are (a BatchNorm frozen with ``eval()`` stays
    frozen); if it is in evaluation mode, ``model.train()`` sets them.

    The results are tested against closed forms. Let p be the rate and ``c = E[x]^2 + Var[x]``. For
    elementwise noise in front of BatchNorm (Uout multiplies by numbers that are uniform in
    [1 - beta, 1 + beta])::

        dropout            V_train = c / (1-p) - E[x]^2
        Uout               V_train = Var[x] + c beta^2 / 3
        Gaussian           V_train = Var[x] + c p / (1-p)

    For a residual sum s + f under stochastic depth::

        row, scale="train"     T_train = T_eval + p / (1-p) E[f^2]
        batch, scale="train"   V_train = Var[s] + 2 Cov[s, f] + Var[f] / (1-p)
        batch, scale="eval"    V_train = Var[s] + (1-p) (2 Cov[s, f] + Var[f])
                               V_eval  = Var[s] + 2 (1-p) Cov[s, f] + (1-p)^2 Var[f]

    Sums are accumulated in float64, merged batch by batch. Residual sums are those of attached
    stochastic depth, under the names of the plan, and in other modules those that
    :func:`torchdrop.find_residuals` finds by default. Not measured: calls of
    ``torch.nn.functional.batch_norm``, and sums in forwards that cannot be read, which the result
    lists.

    The model is not changed, even if an exception is raised: parameters, buffers, training flags,
    hooks, the counts of its plan, and the states of the random generators of Python, NumPy and
    torch are restored. The draws depend on ``torch.manual_seed``, and two calls in a row make the
    same draws.

    Args:
        model: Any module with a BatchNorm or a residual sum.
        batches: An iterable of tensors, of tuples ``(inputs, ...)`` (a DataLoader of inputs and
            labels) or of dicts of keyword arguments. It is iterated over once, so it may be a
            generator. Tensors are moved to the device of the model, if it is on a single one.
        repeats: The number of training passes for each batch, at least 1. Batch mode needs the
            most: with n passes in all, the relative error of a layer decreases as n**-.5.
        channel_dim: The channel dimension of the residual sums. None: 1 in a block that contains a
            convolution or a BatchNorm, else the last.

    Returns:
        A sequence of :class:`LayerShift` in the order of depth, with ``largest``, ``growth`` and a
        table.

    Raises:
        TypeError: ``model`` is not a module; ``batches`` is not iterable, or is a single tensor or
            dict; a batch is not one of the above, or the model does not accept it; ``repeats`` or
            ``channel_dim`` is not an integer.
        ValueError: There is neither a BatchNorm nor a residual sum; ``batches`` is empty;
            ``repeats`` is below 1; a layer is lazy and has no sizes yet; ``channel_dim`` does not
            fit the sums.

    Reference:
        Li et al. 2019, Understanding the Disharmony between Dropout and Batch Normalization by
        Variance Shift, arXiv:1801.05134. Its figures show max(ratio, 1/ratio) of the moving
        variance over the real one.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(8))
        >>> x = torch.randn(4096, 8)  # no mean, variance 1: dropout makes it 2
        >>> round(variance_shift(model, [x]).largest.ratio, 1)
        2.0
    """
    check_model(model)
    check_sizes_known(model)
    check_batches(batches)
    for name, value in (("repeats", repeats), ("channel_dim", channel_dim)):
        wrong = isinstance(value, bool) or not isinstance(value, int)
        if wrong and not (name == "channel_dim" and value is None):
            raise TypeError(f"{name} has to be an integer, but got {value!r}")
    if repeats < 1:
        raise ValueError(f"repeats has to be at least 1, but got {repeats}")
    norms = {m: name for name, m in model.named_modules() if isinstance(m, BatchNormBase)}
    probe = _Probe()
    count = 0
    with ExitStack() as stack:
        buffers = stack.enter_context(untouched(model))
        rest = calls(model, batches)
        first = next(rest)
        sums, unreadable = _residual_sums(model, lambda: _as_example(first), channel_dim)
        buffers.reset()
        if not norms and not sums:
            raise ValueError(
                f"the model has to have a BatchNorm or a residual sum to measure, but there is no "
                f"BatchNorm and no residual sum in this {type(model).__name__}"
                + "".join(
                    f"; {k or 'the model'} cannot be read: {v}" for k, v in unreadable.items()
                )
            )
        flags = _training_flags(model)
        for norm, name in norms.items():
            hook = norm.register_forward_pre_hook(_input_hook(probe, name), with_kwargs=True)
            stack.callback(hook.remove)
        for path, of_path in sums.items():
            stack.enter_context(probe.observe(path, model.get_submodule(path), of_path))
        for call in chain([first], rest):
            for training in [False] + [True] * repeats:
                probe.training = training
                for module, flag in flags[training]:
                    module.training = flag
                buffers.reset()  # because a pass in training updates the running statistics
                # a copy, in case the model writes into its input
                args, kwargs = tree_map_only(Tensor, torch.clone, call)
                model(*args, **kwargs)
            count += 1
    norm_by_name = {name: norm for norm, name in norms.items()}
    layers = [
        _layer_shift(name, kind, by_training, norm_by_name.get(name))
        for (kind, name), by_training in probe.moments.items()
    ]
    effort = f"batches: {count}, training passes each: {repeats}"
    return VarianceShift(type(model).__name__, layers, {**unreadable, **probe.unreadable}, effort)


def _as_example(call: Call) -> Any:
    """Return the arguments of a call in the form of ``example_inputs``."""
    args, kwargs = call
    return kwargs or args


def _training_flags(model: nn.Module) -> dict[bool, list[tuple[nn.Module, bool]]]:
    """Return the training flags of every module, for training passes (True) and evaluation."""
    given = [(m, m.training) for m in model.modules()]
    if not model.training:
        model.train()
    training = [(m, m.training) for m in model.modules()]
    for module, flag in given:
        module.training = flag
    model.eval()
    return {True: training, False: [(m, m.training) for m in model.modules()]}


def _input_hook(
    probe: _Probe, name: str
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """Return a forward pre-hook that passes the input of a BatchNorm to ``probe``."""

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        probe.note("batch_norm", name, x, 1)

    return read


def _layer_shift(
    name: str, kind: str, by_training: dict[bool, Moments], module: nn.Module | None
) -> LayerShift:
    """Return the result for one layer from its moments in training (True) and evaluation."""
    train, total_train = by_training[True].variances()
    evaluation, total_eval = by_training[False].variances()
    running = getattr(module, "running_var", None) if kind == "batch_norm" else None
    if isinstance(running, Tensor):
        running = running.detach().to(evaluation.device, torch.float64)
    ratios = train / evaluation  # a channel that is constant in both gives 0 / 0, which is NaN
    return LayerShift(
        name=name,
        kind=kind,
        ratio=float(ratios.nanmean()),
        var_train=float(train.mean()),
        var_eval=float(evaluation.mean()),
        total_ratio=float((total_train / total_eval).nanmean()),
        total_train=float(total_train.mean()),
        total_eval=float(total_eval.mean()),
        running_ratio=None if running is None else float((running / evaluation).nanmean()),
        running_var=None if running is None else float(running.mean()),
        channel_ratios=ratios,
    )
