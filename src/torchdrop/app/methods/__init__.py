"""The methods that ``torchdrop compare`` compares, one file for each place where they act."""

# Importing a file registers its methods; the order of the imports is the order of the table.
from . import (  # isort: skip
    layer_dropout as layer_dropout,
    branch_dropping as branch_dropping,
    block_outputs as block_outputs,
    branch_outputs as branch_outputs,
    batch_changes as batch_changes,
    fractal_joins as fractal_joins,
)
from .registry import METHODS, NONE, Applied, Method, default_methods, rates, register

__all__ = ["METHODS", "NONE", "Applied", "Method", "default_methods", "rates", "register"]
