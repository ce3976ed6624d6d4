"""Find blocks whose forward cannot be read, but which can be dropped as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from torchdrop.finding.block_reader import CONTAINERS
from torchdrop.finding.example_calls import Example
from torchdrop.finding.residual import Branch, BranchSource, Residual, WholeBlock
from torchdrop.finding.row_layout import (
    RowLayouts,
    differing_dims,
    entries_are_adjacent,
    layout_if_broadcast,
    row_layout,
)
from torchdrop.finding.source_code import source_has_addition
from torchdrop.tracing.call_arguments import flatten_arguments

__all__ = ["find_whole_blocks", "measure_whole_block"]


def find_whole_blocks(
    model: nn.Module,
    example: Example,
    found: Sequence[Residual],
    unreadable: dict[str, str],
    uses: Counter[nn.Module],
    batch_dim: int | None,
) -> list[Residual]:
    """Return the blocks of a stack whose forward cannot be read, each as one branch.

    Args:
        model: The model.
        example: What its blocks are called with, for two batch sizes.
        found: The residuals in the forwards that can be read.
        unreadable: Why forwards cannot be read, by the paths of their modules.
        uses: How often each module is called.
        batch_dim: Which dimension of the residual tensors is the batch; None: any.
    """
    if example.larger is None:
        return []
    layers: list[Residual] = []
    for name, why in unreadable.items():
        module = model.get_submodule(name)
        taken = [r for r in [*found, *layers] if r.default]
        branches = [child for r in taken for b in r.branches for child in b.children]
        separate = not any(f"{r.name}.".startswith(f"{name}.") for r in taken) and not any(
            f"{name}.".startswith(f"{child}.") for child in branches
        )
        candidate = separate and _in_stack(model, name, uses)
        layer = measure_whole_block(name, example, batch_dim) if candidate else None
        if layer is None or not source_has_addition(module):
            continue
        branch = Branch(
            name=name,
            shortcut="identity",
            action="layer",
            reason=f"dropped as a whole, since it cannot be read: {why}",
            p=0.0,
            children=(name,),
            masks=(),
            source=BranchSource(name, whole_block=layer),
        )
        layers.append(Residual(name, module, [branch], owner=name))
    return layers


def _in_stack(model: nn.Module, name: str, uses: Counter[nn.Module]) -> bool:
    """Whether a module is one of several of its class in a container, or is called repeatedly."""
    module = model.get_submodule(name)
    container = model.get_submodule(name.rpartition(".")[0])
    alike = [child for child in container.children() if type(child) is type(module)]
    return uses[module] > 1 or (isinstance(container, CONTAINERS) and len(alike) > 1)


def measure_whole_block(name: str, example: Example, batch_dim: int | None) -> WholeBlock | None:
    """Return how a block is dropped as a whole; None if its output does not fit its input.

    Args:
        name: The path of the block.
        example: What it is called with, for two batch sizes.
        batch_dim: Which dimension of its input is the batch; None: any.
    """
    first, larger = example.first, example.larger
    if larger is None or name not in first.returned or name not in larger.returned:
        return None
    both = [flatten_arguments(recording.calls[name])[1] for recording in (first, larger)]
    if list(both[0]) != list(both[1]) or not both[0]:
        return None
    x = next(iter(both[0]))
    few, many = (tuple(tensors[x].shape) for tensors in both)
    dims = differing_dims(few, many)
    if len(dims) != 1 or batch_dim not in (None, dims[0]):
        return None
    (dim,) = dims
    returned = first.returned[name]
    sum_item = "" if "" in returned else "0"
    if returned.get(sum_item) != few or larger.returned[name].get(sum_item) != many:
        return None
    if set(returned) != {sum_item}:
        return None  # it returns further tensors, which would be needed for all rows
    row_layouts: RowLayouts = {}
    for path in both[0]:
        pair = [tensors[path] for tensors in both]
        layout = row_layout(tuple(pair[0].shape), tuple(pair[1].shape), (few[dim], many[dim]))
        if layout is None:
            return None
        if layout.entries > 1 and not entries_are_adjacent(pair[0], pair[1], layout.dim):
            return None
        one = tuple(pair[0].shape)
        row_layouts[path] = layout if layout.entries else layout_if_broadcast(one, dim)
    return WholeBlock(x, dim, row_layouts, sum_item, first.forms[name])
