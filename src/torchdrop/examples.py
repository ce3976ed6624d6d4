"""WATCH: what the blocks of a model are really called with, in a forward pass of an example."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchdrop.tracing import BlockGraph, same, unfold

__all__ = ["Calls", "Example", "Shapes", "record_calls", "run_once"]

# The arguments by name of one real call of each block, by the block's path.
Calls = dict[str, dict[str, Any]]


@contextmanager
def _leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients; modes, buffers and random numbers are as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers() if not b.is_inference() and not b.is_meta]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):  # the version does not tell: batch_norm
                    buffer.copy_(value)


def run_once(model: nn.Module, example_inputs: Any) -> None:
    """One forward pass that leaves no trace: no gradients, no statistics, no random numbers."""
    with _leaving_no_trace(model):
        if isinstance(example_inputs, Mapping):
            model(**example_inputs)
        elif isinstance(example_inputs, tuple | list):
            model(*example_inputs)
        else:
            model(example_inputs)


def record_calls(model: nn.Module, example_inputs: Any) -> Calls:
    """The arguments, by name, of the first call of every module in one forward pass."""
    calls: Calls = {}
    names = {module: name for name, module in reversed(list(model.named_modules()))}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names.get(module)
        if name is None or name in calls or next(module.children(), None) is None:
            return
        try:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        except (TypeError, ValueError):
            return
        bound.apply_defaults()
        calls[name] = dict(list(bound.arguments.items())[1:])

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in names]
    try:
        run_once(model, example_inputs)
    finally:
        for hook in handles:
            hook.remove()
    return calls


class Example:
    """What the blocks of a model are called with, for an example input and for a larger batch.

    Two batch sizes tell which tensors carry the batch, and on which dimension. A single one does
    not: a sequence may be as long as the batch is large.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, batch_dim: int = 0) -> None:
        self.batch_dim = batch_dim
        self.calls = record_calls(model, example_inputs)
        self._model = model
        self._inputs = example_inputs

    @cached_property
    def larger(self) -> Calls:
        """The calls with a batch twice as large; empty where the model does not take one."""
        # A tensor that has as many rows as the first one may carry the batch. If the model refuses
        # them all twice as large, it may take that of the first one.
        for only_first in (False, True):
            try:
                return record_calls(self._model, self._twice(only_first))
            except Exception:  # the user's model, with an input it was not made for
                continue
        return {}

    def _twice(self, only_first: bool) -> Any:
        sizes: list[int] = []
        dim = self.batch_dim

        def twice(path: str, value: Tensor) -> Tensor:
            if value.dim() <= dim:
                return value
            sizes.append(value.shape[dim])
            double = sizes[-1] == sizes[0] and not (only_first and len(sizes) > 1)
            return torch.cat([value, value], dim) if double else value

        given = self._inputs
        given = list(given) if isinstance(given, tuple | list) else given
        return unfold({"": given}, twice)[0][""]

    def shapes(self, name: str, block: BlockGraph) -> tuple[Shapes, Shapes] | None:
        """The shape of every tensor in the graph of the block ``name``, for both batch sizes."""
        if name not in self.calls or name not in self.larger:
            return None
        both = []
        for calls in (self.calls, self.larger):
            tensors, constants = unfold(calls[name])[1:]
            known = block.constants
            if list(tensors) != block.tensors or any(
                path not in constants or not same(value, constants[path])
                for path, value in known.items()
            ):
                return None
            recorder = _ShapeRecorder(block)
            try:
                with _leaving_no_trace(block.module):
                    recorder.run(*tensors.values())
            except Exception:  # a hook of the user's, say, on which the first forward depends
                return None
            both.append(recorder.shapes)
        return both[0], both[1]


Shapes = dict[fx.Node, tuple[int, ...]]


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, block: BlockGraph) -> None:
        super().__init__(block.module, graph=block.graph)
        self.shapes: Shapes = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value
