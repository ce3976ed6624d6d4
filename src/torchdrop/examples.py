"""WATCH: what the blocks of a model are really called with, in a forward pass of an example."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchdrop.tracing import BlockGraph, same, unfold

__all__ = ["ArgumentShapes", "Calls", "Example", "Shapes", "record_calls", "run_once"]

# The arguments by name of one real call of each block, by the block's path.
Calls = dict[str, dict[str, Any]]

# Of each argument that is a tensor the shape, in both batch sizes.
ArgumentShapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

# How many ways to make the batch of an example larger are tried.
_GUESSES = 24


@contextmanager
def _leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients; modes, buffers and random numbers are as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers() if not b.is_inference() and not b.is_meta]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    # In evaluation torch's attention may take a fused path with nested tensors, past its parts.
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
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


def _rows(value: Tensor, dim: int) -> int | None:
    return value.shape[dim] if value.dim() > dim else None


class Example:
    """What the blocks of a model are called with, for an example input and for a larger batch.

    Two batch sizes tell which tensors carry the batch, and on which dimension. A single one does
    not: a sequence may be as long as the batch is large.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, batch_dim: int | None = None) -> None:
        self._batch_dim = batch_dim or 0
        self.calls = record_calls(model, example_inputs)
        self._model = model
        self._inputs = example_inputs

    @cached_property
    def larger(self) -> Calls:
        """The calls with a batch twice as large; empty where the model does not take one."""
        for dims in self._guesses():
            try:
                return record_calls(self._model, self._twice(dims))
            except Exception:  # the user's model, with an input it was not made for
                continue
        return {}

    def expect(self, batch_dim: int) -> None:
        """Look for the batch on dimension ``batch_dim`` of the inputs first."""
        self._batch_dim = batch_dim
        self.__dict__.pop("larger", None)

    def _guesses(self) -> Iterator[list[int | None]]:
        """On which dimension each input may carry the batch, the likeliest first."""
        tensors = list(unfold({"": self._given()})[1].values())
        if not tensors:
            return
        first, *others = tensors
        seen: list[list[int | None]] = []
        for dim in dict.fromkeys((self._batch_dim, 0, 1)):
            if first.dim() <= dim:
                continue
            # Those that have as many rows as the first one; it alone; or any mixture: a mask of
            # (batch, time) beside tokens of (time, batch, features).
            fits = [
                [*(d for d in dict.fromkeys((dim, 0, 1)) if _rows(t, d) == _rows(first, dim)), None]
                for t in others
            ]
            alike = [dim if _rows(t, dim) == _rows(first, dim) else None for t in others]
            mixtures = ([dim, *rest] for rest in itertools.product(*fits))
            for guess in ([dim, *alike], [dim, *[None] * len(others)], *mixtures):
                if guess not in seen:
                    seen.append(guess)
                    yield guess
                if len(seen) >= _GUESSES:
                    return

    def _given(self) -> Any:
        given = self._inputs
        if isinstance(given, Mapping):
            return dict(given)
        return list(given) if isinstance(given, tuple | list) else given

    def _twice(self, dims: Sequence[int | None]) -> Any:
        remaining = iter(dims)

        def twice(path: str, value: Tensor) -> Tensor:
            dim = next(remaining)
            return value if dim is None else torch.cat([value, value], dim)

        return unfold({"": self._given()}, twice)[0][""]

    def argument_shapes(self, name: str) -> ArgumentShapes:
        """The shapes of the tensors that the block ``name`` is called with, in both batch sizes."""
        if name not in self.calls or name not in self.larger:
            return {}
        one, two = (unfold(calls[name])[1] for calls in (self.calls, self.larger))
        return {path: (one[path].shape, two[path].shape) for path in one if path in two}

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
