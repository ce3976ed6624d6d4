"""WATCH: what the blocks of a model are really called with, in a forward pass of an example."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchdrop.tracing.block_graph import BlockGraph, PlainValue
from torchdrop.tracing.call_arguments import flatten_arguments
from torchdrop.tracing.unchanged import attention_fast_path_off, unchanged
from torchdrop.tracing.watched_attributes import same

__all__ = [
    "ArgumentShapes",
    "Calls",
    "Example",
    "Recording",
    "Shapes",
    "record",
    "run_once",
]  # fmt: skip

# The arguments by name of one real call of each block, by the block's path.
Calls = dict[str, dict[str, Any]]

# Of each argument that is a tensor the shape, in both batch sizes.
ArgumentShapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

# How many ways to make the batch of an example larger are tried.
_GUESSES = 24


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in evaluation and without gradients, and leave it as it was."""
    with unchanged(model), attention_fast_path_off(), torch.no_grad():
        model.eval()
        yield


def run_once(model: nn.Module, example_inputs: Any) -> None:
    """One forward pass that leaves no trace: no gradients, no statistics, no random numbers."""
    with _evaluating(model):
        if isinstance(example_inputs, Mapping):
            model(**example_inputs)
        elif isinstance(example_inputs, tuple | list):
            model(*example_inputs)
        else:
            model(example_inputs)


@dataclass
class Recording:
    """What one forward pass of a model told about its modules, each at its first call.

    Attributes:
        calls: The arguments, by name, of every composite module, by its path.
        returned: The shapes of the tensors that it returned, by their place ("" for a tensor, "0"
            for the first of a tuple), by its path.
        forms: What it returned, with None for each tensor, by its path.
        items: For modules that return a tuple, what each item was: None; the place of the argument
            (a number, or a name) that it was; a :class:`PlainValue` where it was a
            number or a list of them; or ``...`` for anything else.
        times: How often each module was called.
    """

    calls: Calls
    returned: dict[str, dict[str, tuple[int, ...]]]
    forms: dict[str, Any]
    items: dict[nn.Module, list[Any]]
    times: Counter[nn.Module]


def record(model: nn.Module, example_inputs: Any) -> Recording:
    """Run ``model`` once, in evaluation, and note what its modules are called with and return.

    Raises:
        ValueError: It cannot be called like that.
    """
    found = Recording({}, {}, {}, {}, Counter())
    names = {module: name for name, module in reversed(list(model.named_modules()))}

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.times[module] += 1
        if found.times[module] > 1 or next(module.children(), None) is None:
            return
        try:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        except (TypeError, ValueError):
            return
        bound.apply_defaults()
        found.calls[names[module]] = dict(list(bound.arguments.items())[1:])

    def returned(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if isinstance(output, tuple | list) and module not in found.items:
            given = [*enumerate(args), *kwargs.items()]
            found.items[module] = [
                None if item is None else next((k for k, v in given if v is item), _fixed(item))
                for item in output
            ]
        name = names[module]
        if name in found.calls and name not in found.returned:
            tensors = flatten_arguments({"": output})[1]
            found.forms[name] = flatten_arguments({"": output}, lambda path, value: None)[0][""]
            found.returned[name] = {k.lstrip("."): tuple(v.shape) for k, v in tensors.items()}

    handles = [m.register_forward_pre_hook(called, with_kwargs=True) for m in names]
    handles += [m.register_forward_hook(returned, with_kwargs=True) for m in names]
    try:
        run_once(model, example_inputs)
    except Exception as error:  # whatever the user's model raises
        raise ValueError(
            f"this {type(model).__name__} cannot be called with example_inputs, "
            f"{_described(example_inputs)}: {type(error).__name__}: {error}. example_inputs is "
            f"what the model is called with, the batch dimension included: a tensor, a tuple "
            f"of arguments, or a dict of keyword arguments"
        ) from error
    finally:
        for hook in handles:
            hook.remove()
    return found


def _fixed(item: Any) -> Any:
    """``item`` where it is a plain value, not to be told from another of the same size."""
    plain = item if isinstance(item, tuple | list) else [item]
    return PlainValue(item) if all(type(i) in (bool, int, float, str) for i in plain) else ...


def _described(example_inputs: Any) -> str:
    """The shapes of an example, for an error message."""
    if isinstance(example_inputs, Mapping):
        return ", ".join(f"{k}={_described(v)}" for k, v in example_inputs.items()) or "none"
    if isinstance(example_inputs, tuple | list):
        return f"({', '.join(map(_described, example_inputs))})"
    if isinstance(example_inputs, Tensor):
        return f"a tensor of shape {tuple(example_inputs.shape)}"
    return f"a {type(example_inputs).__name__}"


def _rows(value: Tensor, dim: int) -> int | None:
    return value.shape[dim] if value.dim() > dim else None


class Example:
    """What the blocks of a model are called with, for an example input and for a larger batch.

    Two batch sizes tell which tensors carry the batch, and on which dimension. A single one does
    not: a sequence may be as long as the batch is large.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, batch_dim: int | None = None) -> None:
        self._batch_dim = batch_dim or 0
        self.first = record(model, example_inputs)
        self._model = model
        self._inputs = example_inputs

    @cached_property
    def larger(self) -> Recording | None:
        """The same with a batch twice as large; None where the model does not take one."""
        for dims in self._guesses():
            try:
                return record(self._model, self._twice(dims))
            except Exception:  # the user's model, with an input it was not made for
                continue
        return None

    def expect(self, batch_dim: int) -> None:
        """Look for the batch on dimension ``batch_dim`` of the inputs first."""
        self._batch_dim = batch_dim
        self.__dict__.pop("larger", None)

    def _guesses(self) -> Iterator[list[int | None]]:
        """On which dimension each input may carry the batch, the likeliest first."""
        tensors = list(flatten_arguments({"": self._given()})[1].values())
        if not tensors:
            return
        first, *others = tensors
        seen: list[list[int | None]] = []
        for dim in dict.fromkeys((self._batch_dim, 0, 1)):
            if first.dim() <= dim:
                continue
            # Those that have as many rows as the first one; it alone; or any mixture: a mask of
            # (batch, time) beside tokens of (time, batch, features).
            batch = first.shape[dim]
            fits = [
                [
                    *(d for d in dict.fromkeys((dim, 0, 1)) if _rows(t, d) == batch),
                    # (batch * heads, time, time)
                    *(
                        d
                        for d in (0,)
                        if (_rows(t, d) or 1) > batch > 1 and t.shape[d] % batch == 0
                    ),
                    None,
                ]
                for t in others
            ]
            alike = [dim if _rows(t, dim) == batch else None for t in others]
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

        return flatten_arguments({"": self._given()}, twice)[0][""]

    def argument_shapes(self, name: str) -> ArgumentShapes:
        """The shapes of the tensors that the block ``name`` is called with, in both batch sizes."""
        if self.larger is None or name not in self.first.calls or name not in self.larger.calls:
            return {}
        both = self.first.calls[name], self.larger.calls[name]
        one, two = (flatten_arguments(call)[1] for call in both)
        return {path: (one[path].shape, two[path].shape) for path in one if path in two}

    def shapes(self, name: str, block: BlockGraph) -> tuple[Shapes, Shapes] | None:
        """The shape of every tensor in the graph of the block ``name``, for both batch sizes."""
        if self.larger is None or name not in self.first.calls or name not in self.larger.calls:
            return None
        both = []
        for calls in (self.first.calls, self.larger.calls):
            tensors, constants = flatten_arguments(calls[name])[1:]
            known = block.constants
            if list(tensors) != block.tensors or any(
                path not in constants or not same(value, constants[path])
                for path, value in known.items()
            ):
                return None
            recorder = Shapes(block)
            try:
                with _evaluating(block.module):
                    recorder.run(*tensors.values())
            except Exception:  # a hook of the user's, say, on which the first forward depends
                return None
            both.append(recorder)
        return both[0], both[1]


class Shapes(fx.Interpreter):
    """The tensors of a graph in one call: their shapes, and those on whose order rows depend.

    Attributes:
        shapes: The shape of the value of each node.
        values: The values themselves of the placeholders.
    """

    def __init__(self, block: BlockGraph) -> None:
        super().__init__(block.module, graph=block.graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Note what ``n`` is."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
            if n.op == "placeholder":
                self.values[n] = value
        return value
