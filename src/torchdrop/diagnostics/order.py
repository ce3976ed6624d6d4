"""Find dropouts before a BatchNorm by reading the forwards of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchdrop.checks import check_model
from torchdrop.diagnostics.batches import check_sizes_known
from torchdrop.diagnostics.data_flow import AN_INPUT, DataFlow, Dropout
from torchdrop.diagnostics.order_report import OrderFinding, OrderReport
from torchdrop.finding.example_calls import record
from torchdrop.internals import BatchNormBase
from torchdrop.tracing.own_forward import signature_of_forward

__all__ = ["OrderFinding", "OrderReport", "check_order"]


def check_order(model: nn.Module, example_inputs: Any = None) -> OrderReport:
    """Report each dropout whose output reaches a BatchNorm.

    Dropout changes the variance of the values that follow in training, but not in evaluation. A
    BatchNorm after it stores the variance of training and normalises with it in evaluation
    (:func:`variance_shift` measures the difference). The reference recommends to drop after the
    last BatchNorm.

    The forwards are read in training mode, and not run. The output of every dropout is followed
    through layers, functions and additions up to the first BatchNorm on each path. A dropout is
    reported with all BatchNorms that it reaches; the nearest, by the number of operations, comes
    first.

    Counted as dropout, if its rate is not 0 now: the dropout layers of torch, the ``dropout`` of
    attention and recurrent layers, the layers of this package, stochastic depth that was added,
    other layers without parameters whose class name contains "drop" or "shake", the functions of
    torch and of this package that drop, and masks that are drawn by ``bernoulli``.

    Args:
        model: Any module. It is not changed.
        example_inputs: What the model is called with: a tensor, a tuple, or a dict of keyword
            arguments. Needed for models whose forwards cannot be read from their signatures alone.
            The model is run once, in evaluation, and restored.

    Returns:
        A sequence with one :class:`OrderFinding` for each dropout; empty if there is nothing to
        report. Its ``unreadable`` names the forwards that could not be read. The modules in them
        are followed one by one, and findings that depend on them are marked as assumed.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: The parameters of a lazy layer are not initialised yet.

    Reference:
        Li et al. 2019, Understanding the Disharmony between Dropout and Batch Normalization by
        Variance Shift, arXiv:1801.05134.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3), nn.BatchNorm1d(3))
        >>> check_order(model)
        order in Sequential: 1 dropout before a BatchNorm
          0 (Dropout, 0.5) stands before 2: in the model's own forward, 2 operations on
    """
    check_model(model)
    check_sizes_known(model)
    recorded = {} if example_inputs is None else record(model, example_inputs).calls
    flow = DataFlow(model, recorded)
    flow.module(model, *_required_arguments(model))
    findings = [
        _finding(dropout, flow.reached[dropout])
        for dropout in flow.dropouts
        if dropout in flow.reached
    ]
    norms = sum(isinstance(m, BatchNormBase) for m in model.modules())
    return OrderReport(type(model).__name__, findings, flow.unreadable, norms)


def _required_arguments(model: nn.Module) -> tuple[list[Any], dict[str, Any]]:
    """Return a tensor for each parameter of the forward of ``model`` that has no default."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter in signature_of_forward(model).parameters.values():
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[parameter.name] = AN_INPUT
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                args.append(AN_INPUT)
    return args, kwargs


def _finding(dropout: Dropout, reached: dict[str, tuple[int, bool]]) -> OrderFinding:
    """Return the finding about one dropout, given the BatchNorms that it reaches."""
    nearest = min(reached, key=lambda path: (reached[path][1], reached[path][0]))
    distance, assumed = reached[nearest]
    common = []
    for one, two in zip(dropout.path.split("."), nearest.split("."), strict=False):
        if one != two:
            break
        common.append(one)
    return OrderFinding(
        dropout=dropout.path,
        kind=dropout.kind,
        rate=dropout.rate,
        batch_norm=nearest,
        forward=".".join(common),
        distance=distance,
        further=tuple(path for path in reached if path != nearest),
        assumed=assumed,
    )
