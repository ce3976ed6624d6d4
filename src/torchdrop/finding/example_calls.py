"""Record the arguments and outputs of the blocks of a model in a forward pass of an example."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchdrop.finding.row_layout import differing_dims, entries_are_adjacent
from torchdrop.rows.sampling import refuse_nested
from torchdrop.tracing.block_graph import BlockGraph, PlainValue
from torchdrop.tracing.call_arguments import flatten_arguments
from torchdrop.tracing.modes import use_modes
from torchdrop.tracing.own_forward import signature_of_forward
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
    "run_with_gradients",
]  # fmt: skip

# The arguments by name of one real call of each block, by the block's path.
Calls = dict[str, dict[str, Any]]

# The shapes of each argument that is a tensor, for both batch sizes, by its path.
ArgumentShapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

# At most this many assumptions about the batch dimensions of an example are tried.
_MOST_GUESSES = 24


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in evaluation and without gradients, and leave it as it was."""
    with (
        unchanged(model),
        attention_fast_path_off(),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        # a reentrant checkpoint warns of what is intended here: no gradients
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
        model.eval()
        yield


def run_once(model: nn.Module, example_inputs: Any) -> None:
    """Run one forward pass in evaluation, without gradients, and leave the model as it was."""
    with _evaluating(model):
        _call(model, example_inputs)


def run_with_gradients(model: nn.Module, example_inputs: Any) -> None:
    """Run one forward pass with gradients, in the mode in which the model is."""
    with torch.enable_grad():
        _call(model, example_inputs)


def _call(model: nn.Module, example_inputs: Any) -> None:
    """Call ``model`` with a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        model(**example_inputs)
    elif isinstance(example_inputs, tuple | list):
        model(*example_inputs)
    else:
        model(example_inputs)


@dataclass
class Recording:
    """The arguments and outputs of the modules in one forward pass, each at its first call.

    Attributes:
        calls: The arguments, by name, of every composite module, by its path.
        returned: The shapes of the tensors that it returned ("" for a single tensor, "0" for the
            first of a tuple), by its path.
        forms: Its output with None in place of tensors, by its path.
        items: For modules that return a tuple, what each item was: None; the position or the name
            of an argument, if it was that argument; a :class:`PlainValue`, if it was a number or a
            list of numbers; ``...`` for anything else.
        times: How often each module was called.
    """

    calls: Calls
    returned: dict[str, dict[str, tuple[int, ...]]]
    forms: dict[str, Any]
    items: dict[nn.Module, list[Any]]
    times: Counter[nn.Module]


def record(model: nn.Module, example_inputs: Any) -> Recording:
    """Run ``model`` once in evaluation, and record the arguments and outputs of its modules.

    Raises:
        ValueError: The model cannot be called with ``example_inputs``.
    """
    found = Recording({}, {}, {}, {}, Counter())
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    handles = [
        *(
            m.register_forward_pre_hook(_argument_recorder(found, names), with_kwargs=True)
            for m in names
        ),
        *(m.register_forward_hook(_output_recorder(found, names), with_kwargs=True) for m in names),
    ]
    try:
        run_once(model, example_inputs)
    except Exception as error:  # the user's model may raise anything
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


def _argument_recorder(found: Recording, names: Mapping[nn.Module, str]) -> Callable[..., None]:
    """Return a forward pre-hook that records the arguments of composite modules in ``found``."""

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.times[module] += 1
        if found.times[module] > 1 or next(module.children(), None) is None:
            return
        try:
            bound = signature_of_forward(module).bind(*args, **kwargs)
        except (TypeError, ValueError):
            return
        bound.apply_defaults()
        found.calls[names[module]] = dict(bound.arguments)

    return called


def _output_recorder(found: Recording, names: Mapping[nn.Module, str]) -> Callable[..., None]:
    """Return a forward hook that records the outputs of modules in ``found``."""

    def returned(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if isinstance(output, tuple | list) and module not in found.items:
            given = [*enumerate(args), *kwargs.items()]
            found.items[module] = [
                None if item is None else next((k for k, v in given if v is item), _if_plain(item))
                for item in output
            ]
        name = names[module]
        if name in found.calls and name not in found.returned:
            tensors = flatten_arguments({"": output})[1]
            found.forms[name] = flatten_arguments({"": output}, lambda path, value: None)[0][""]
            found.returned[name] = {k.lstrip("."): tuple(v.shape) for k, v in tensors.items()}

    return returned


def _if_plain(item: Any) -> Any:
    """Return a :class:`PlainValue` if ``item`` is made of numbers and strings, else ``...``."""
    plain = item if isinstance(item, tuple | list) else [item]
    return PlainValue(item) if all(type(i) in (bool, int, float, str) for i in plain) else ...


def _described(example_inputs: Any) -> str:
    """Describe an example by its shapes, for an error message."""
    if isinstance(example_inputs, Mapping):
        return ", ".join(f"{k}={_described(v)}" for k, v in example_inputs.items()) or "none"
    if isinstance(example_inputs, tuple | list):
        return f"({', '.join(map(_described, example_inputs))})"
    if isinstance(example_inputs, Tensor):
        return f"a tensor of shape {tuple(example_inputs.shape)}"
    return f"a {type(example_inputs).__name__}"


def _size(value: Tensor, dim: int) -> int | None:
    return value.shape[dim] if value.dim() > dim else None


class Example:
    """The arguments of the blocks of a model, for an example input and for a larger batch.

    Two batch sizes show which tensors carry the batch, and on which dimension. One batch size is
    not enough: the length of a sequence may happen to equal the batch size.

    Args:
        model: The model.
        example_inputs: The arguments of the model.
        batch_dim: Which dimension of the inputs is the batch; None: most likely the first.

    Attributes:
        first: The recording with ``example_inputs``.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, batch_dim: int | None = None) -> None:
        for tensor in flatten_arguments({"": example_inputs})[1].values():
            refuse_nested(tensor)
        self._batch_dim = batch_dim or 0
        self.first = record(model, example_inputs)
        self._model = model
        self._inputs = example_inputs
        self._samples = 1  # how many samples the inputs hold; ``larger`` sets it

    @cached_property
    def larger(self) -> Recording | None:
        """A recording of the model on twice as many samples; None if no such call succeeds."""
        for dims in self._guesses():
            try:
                found = record(self._model, self._twice(dims))
            except Exception:  # the model may raise anything if the assumption is wrong
                continue
            tensors = flatten_arguments({"": self._given()})[1].values()
            sizes = [t.shape[d] for t, d in zip(tensors, dims, strict=True) if d is not None]
            self._samples = sizes[0]
            return found
        return None

    def rows_per_sample(self, name: str, dim: int) -> int:
        """Return how many neighbouring rows each sample has in the block ``name``; 1 if unknown.

        A clip may be flattened into its frames, an image into its windows. Their number follows
        from two batch sizes, and their order from the values of the arguments.

        Args:
            name: The path of the block.
            dim: The dimension of its arguments that carries the rows.
        """
        for path, (one, two) in self.argument_shapes(name).items():
            if differing_dims(one, two) != [dim] or self.larger is None:
                continue
            rows, rest = divmod(one[dim], self._samples)
            if rest or rows < 2 or two[dim] != 2 * one[dim]:
                continue
            few, many = (flatten_arguments(r.calls[name])[1] for r in (self.first, self.larger))
            if entries_are_adjacent(few[path], many[path], dim):
                return rows
        return 1

    def assume_batch_dim(self, batch_dim: int) -> None:
        """Try ``batch_dim`` as the batch dimension of the inputs before other dimensions."""
        self._batch_dim = batch_dim
        self.__dict__.pop("larger", None)

    def _guesses(self) -> Iterator[list[int | None]]:
        """Yield assumptions about the batch dimension of each input, the likeliest first."""
        tensors = list(flatten_arguments({"": self._given()})[1].values())
        if not tensors:
            return
        first, *others = tensors
        seen: list[list[int | None]] = []
        for dim in dict.fromkeys((self._batch_dim, 0, 1)):
            if first.dim() <= dim:
                continue
            # Every input of the same size on that dimension carries the batch; or only the first
            # input; or each input on a dimension of its own, such as a mask of shape (batch, time)
            # with tokens of shape (time, batch, features).
            batch = first.shape[dim]
            fits = [
                [
                    *(d for d in dict.fromkeys((dim, 0, 1)) if _size(t, d) == batch),
                    # (batch * heads, time, time)
                    *(
                        d
                        for d in (0,)
                        if (_size(t, d) or 1) > batch > 1 and t.shape[d] % batch == 0
                    ),
                    None,
                ]
                for t in others
            ]
            same_dim = [dim if _size(t, dim) == batch else None for t in others]
            mixtures = ([dim, *rest] for rest in itertools.product(*fits))
            for guess in ([dim, *same_dim], [dim, *[None] * len(others)], *mixtures):
                if guess not in seen:
                    seen.append(guess)
                    yield guess
                if len(seen) >= _MOST_GUESSES:
                    return

    def _given(self) -> Any:
        """Return the example inputs with their container as a plain dict or list."""
        given = self._inputs
        if isinstance(given, Mapping):
            return dict(given)
        return list(given) if isinstance(given, tuple | list) else given

    def _twice(self, dims: Sequence[int | None]) -> Any:
        """Return the inputs with a batch twice as large.

        Args:
            dims: The batch dimension of each tensor; None for a tensor that has no batch.
        """
        remaining = iter(dims)

        def twice(path: str, value: Tensor) -> Tensor:
            dim = next(remaining)
            return value if dim is None else torch.cat([value, value], dim)

        return flatten_arguments({"": self._given()}, twice)[0][""]

    def argument_shapes(self, name: str) -> ArgumentShapes:
        """Return the shapes of the arguments of the block ``name``, for both batch sizes."""
        if self.larger is None or name not in self.first.calls or name not in self.larger.calls:
            return {}
        both = self.first.calls[name], self.larger.calls[name]
        one, two = (flatten_arguments(call)[1] for call in both)
        return {path: (one[path].shape, two[path].shape) for path in one if path in two}

    def shapes(self, name: str, block: BlockGraph) -> tuple[Shapes, Shapes] | None:
        """Return the shapes of all tensors in the graph of a block, for both batch sizes.

        None if the block was not called, or with other arguments than ``block`` was traced with.
        """
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
            except Exception:  # for example if the forward depends on a hook of the user
                return None
            both.append(recorder)
        return both[0], both[1]


class Shapes(fx.Interpreter):
    """Runs a graph and records the shapes of all tensors in it.

    Attributes:
        shapes: The shape of the tensor of each node.
        values: The tensors of the placeholders.
    """

    def __init__(self, block: BlockGraph) -> None:
        super().__init__(block.module, graph=block.graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run the node ``n`` and record the shape of its value."""
        with use_modes(n.meta.get("modes")):
            value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
            if n.op == "placeholder":
                self.values[n] = value
        return value
