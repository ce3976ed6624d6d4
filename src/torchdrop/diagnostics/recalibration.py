"""Recompute the running statistics of BatchNorm, with the rest of the network in evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

from torchdrop.checks import check_model
from torchdrop.diagnostics.batches import calls, check_batches, check_sizes_known
from torchdrop.diagnostics.untouched import untouched
from torchdrop.internals import BatchNormBase

__all__ = ["recalibrate_batch_norm"]


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> list[str]:
    """Recompute the running statistics of every BatchNorm, so that they fit evaluation.

    Dropping activations and branches changes the variance of the inputs of BatchNorm, so the
    statistics of training do not fit evaluation. Here the statistics of each layer become the
    plain mean, over the batches b = 1..n, of the mean and the unbiased variance of its input::

        running_mean = 1/n sum_b mean(x_b),     running_var = 1/n sum_b var(x_b)

    (the update of training with ``momentum=None``, starting from reset statistics). For this, all
    BatchNorm modules are in training mode, each normalising with the statistics of its batch, and
    everything else is in evaluation mode: no dropout, no stochastic depth, no other noise. Each
    batch has the same weight whatever its size, so leave out a short last one
    (``drop_last=True``), and use batches at least as large as in training.

    Changed in place: ``running_mean``, ``running_var`` and ``num_batches_tracked`` (to n) of the
    layers that the forward pass reaches, including frozen ones. Parameters, gradients,
    ``momentum``, training flags, hooks, other buffers and the global random numbers are restored.
    If an exception is raised, the statistics are restored, too.

    Args:
        model: A model with BatchNorm layers that have running statistics.
        batches: An iterable of tensors, of tuples ``(inputs, ...)`` (a DataLoader of inputs and
            labels) or of dicts of keyword arguments. It is iterated over once, so it may be a
            generator. Training data without augmentation is the usual choice. Tensors are moved
            to the device of the model, if it is on a single one.

    Returns:
        The paths of the layers with new statistics, in the order of ``named_modules``. Layers
        that evaluation does not reach (an auxiliary head) keep theirs and are not listed.

    Raises:
        TypeError: ``model`` is not a module; ``batches`` is not iterable, or is a single tensor or
            dict; a batch is not one of the above, or the model does not accept it.
        ValueError: No BatchNorm has running statistics; a layer is lazy and has no sizes yet;
            ``batches`` is empty; or, from BatchNorm, a batch has a single value per channel.

    Reference:
        Li et al. 2019, Understanding the Disharmony between Dropout and Batch Normalization by
        Variance Shift, arXiv:1801.05134, on why the statistics do not fit. The cumulative mean is
        the one of Izmailov et al. 2018, arXiv:1803.05407 (``torch.optim.swa_utils.update_bn``,
        which leaves dropout on).

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
        >>> recalibrate_batch_norm(model, [torch.ones(4, 3)])
        ['1']
        >>> model[1].running_mean
        tensor([1., 1., 1.])
    """
    check_model(model)
    check_sizes_known(model)
    check_batches(batches)
    layers = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, BatchNormBase)
        and module.track_running_stats
        and module.running_mean is not None
        and module.running_var is not None
        and module.num_batches_tracked is not None
    }
    if not layers:
        raise ValueError(
            f"there is no BatchNorm with running statistics in this {type(model).__name__}"
        )
    with ExitStack() as stack:
        buffers = stack.enter_context(untouched(model))
        for layer in layers:
            stack.callback(setattr, layer, "momentum", layer.momentum)
        model.eval()
        for layer in layers:
            # not layer.train(), which would change its children (an activation), too
            layer.training = True
            layer.momentum = None
            layer.reset_running_stats()
        for args, kwargs in calls(model, batches):
            model(*args, **kwargs)
        reached = {m for m in layers if int(m.num_batches_tracked or 0) > 0}
        buffers.keep(reached.__contains__)
    return [name for module, name in layers.items() if module in reached]
