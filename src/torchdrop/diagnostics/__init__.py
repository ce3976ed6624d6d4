"""Measure what a model costs, and how its dropouts affect BatchNorm."""

from torchdrop.cost import flops, saved_bytes
from torchdrop.diagnostics.order import OrderFinding, OrderReport, check_order
from torchdrop.diagnostics.recalibration import recalibrate_batch_norm
from torchdrop.diagnostics.shift import LayerShift, VarianceShift
from torchdrop.diagnostics.variance import variance_shift

__all__ = [
    "LayerShift",
    "OrderFinding",
    "OrderReport",
    "VarianceShift",
    "check_order",
    "flops",
    "recalibrate_batch_norm",
    "saved_bytes",
    "variance_shift",
]
