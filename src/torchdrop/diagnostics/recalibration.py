"""Take the statistics of BatchNorm anew, with the network as it is in evaluation."""

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
    """Take the running statistics of every BatchNorm anew, as evaluation will need them.

    Dropped activations and branches change the variance of what BatchNorm sees, so the statistics
    of training do not fit evaluation. Here each layer's statistics become the plain mean, over
    the batches b = 1..n, of the mean and the unbiased variance of its input::

        running_mean = 1/n sum_b mean(x_b),     running_var = 1/n sum_b var(x_b)

    (the update of training with ``momentum=None``, from reset statistics). Only the BatchNorm
    modules are in training mode meanwhile, all at once, each normalising with the statistics of
    its batch; everything else is as in evaluation, so that no dropout, no stochastic depth, no
    other noise is on. Batches count alike whatever their size: leave a short last one out
    (``drop_last=True``), and use batches as large as in training or larger.

    Changed in place: ``running_mean``, ``running_var`` and ``num_batches_tracked`` (now n) of the
    layers that the forward pass reached, frozen ones too. Parameters, gradients, ``momentum``,
    training flags, hooks, other buffers and the global random numbers are as before. If anything
    raises, the statistics are those of before as well.

    Args:
        model: A model with BatchNorm layers that have running statistics.
        batches: An iterable of tensors, of tuples ``(inputs, ...)`` (a DataLoader of inputs and
            labels) or of dicts of keyword arguments; gone through once, so a generator will do.
            Training data without augmentation is the usual choice. Tensors are moved to the
            model's device where it is on a single one.

    Returns:
        The paths of the layers whose statistics are new, in the order of ``named_modules``. Layers
        that evaluation does not reach (an auxiliary head) keep theirs and are not listed.

    Raises:
        TypeError: ``model`` is no module; ``batches`` is not iterable, or is a single tensor or
            dict; a batch is none of the above, or not what the model takes.
        ValueError: No BatchNorm has running statistics; a layer has no sizes yet (lazy); there is
            no batch; or, from BatchNorm, a batch has a single value a channel.

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
            layer.training = True  # of this module alone: it may have children (an activation)
            layer.momentum = None
            layer.reset_running_stats()
        for args, kwargs in calls(model, batches):
            model(*args, **kwargs)
        reached = {m for m in layers if int(m.num_batches_tracked or 0) > 0}
        buffers.keep(reached.__contains__)
    return [name for module, name in layers.items() if module in reached]
