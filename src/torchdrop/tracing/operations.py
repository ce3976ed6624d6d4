"""The table of the functions, methods and layers that a forward may call.

All that torchdrop knows about an operation is in its entry in :data:`TABLE`: whether it is linear,
whether it returns a view, how to read a residual sum from it, whether it drops. The tracer, the
search for residual branches, the check of source code and ``check_order`` read this table and know
no operation by name. To support another operation, add an entry.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from torchdrop.internals import BatchNormBase, ConvBase, DropoutBase
from torchdrop.tracing.operation import DropForm, Operation, SumForm
from torchdrop.tracing.traced_functions import (
    add_padded,
    add_product,
    add_product_,
    no_shortcut,
    passed_through,
)

__all__ = [
    "TABLE",
    "attribute",
    "callee",
    "factories",
    "in_place_operators",
    "is_function_of_table",
    "layers_with",
    "masks_branches",
    "named",
    "names_of_additions",
    "operation_of",
    "works_on_numbers",
    "writes_first_argument",
]

TABLE: tuple[Operation, ...] = (
    # Sums and products.
    Operation(
        ("add",), in_place=("iadd", "add_"), linear=True, keeps_layout=True, on_numbers=True,
        sum=SumForm(factor="alpha"),
    ),
    Operation(
        ("sub",), in_place=("isub", "sub_"), linear=True, keeps_layout=True, on_numbers=True,
        sum=SumForm(factor="alpha", sign=-1.0),
    ),
    Operation(("addcmul",), spelled_out=add_product),
    Operation(in_place=("addcmul_",), spelled_out=add_product_),
    Operation(functions=(add_padded,), sum=SumForm("left", "right", pad_dim="dim")),
    Operation(
        ("mul", "multiply", "rmul"), in_place=("imul", "mul_"), product=True, keeps_layout=True,
        on_numbers=True, mask_factor=True,
    ),
    Operation(
        ("truediv", "div"), in_place=("itruediv", "div_"), product=True, keeps_layout=True,
        on_numbers=True, mask_factor=True,
    ),
    Operation(("lerp",), in_place=("lerp_",), blends=True),
    Operation(("where",), mask_factor=True),
    Operation(("neg",), linear=True, on_numbers=True),
    Operation(("matmul", "mm", "bmm", "baddbmm", "einsum"), product=True),
    Operation(("linear",), layers=(nn.Linear, nn.Bilinear), product=True),
    Operation(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        layers=(
            nn.Conv1d, nn.Conv2d, nn.Conv3d,
            nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        ),
        product=True,
    ),
    # Operators that are not linear, or matter for sizes only.
    Operation(("floordiv",), in_place=("ifloordiv",), on_numbers=True),
    Operation(("mod",), in_place=("imod",), on_numbers=True),
    Operation(("pow",), in_place=("ipow",), on_numbers=True),
    Operation(("eq", "ne", "lt", "le", "gt", "ge"), on_numbers=True),
    # The bare names are keywords of Python; the underscore does not mean that these are in place.
    Operation(("and_",), in_place=("iand",)),
    Operation(("or_",), in_place=("ior",)),
    Operation(("xor",), in_place=("ixor",)),
    Operation(("not_", "is_")),
    Operation(in_place=("setitem",)),
    Operation(
        functions=(int, float, bool, len, min, max, slice, torch.finfo, torch.iinfo),
        on_numbers=True,
    ),
    # Shapes: other views of the same entries, parts of them, and parts put together.
    Operation(("getitem",), linear=True, view=True, on_numbers=True),
    Operation(
        ("view", "reshape", "view_as", "squeeze", "unsqueeze"),
        linear=True, view=True, keeps_order=True,
    ),
    Operation(
        (
            "permute", "transpose", "swapaxes", "t", "movedim", "moveaxis", "expand", "expand_as",
            "narrow", "select",
        ),
        linear=True, view=True,
    ),
    Operation(("chunk", "split"), linear=True, view=True, returns_tuple=True),
    Operation(
        ("flatten", "unflatten"), layers=(nn.Flatten, nn.Unflatten), linear=True, view=True,
        moves_dims=True, keeps_order=True,
    ),
    Operation(("unbind",), view=True, returns_tuple=True),
    Operation(("cat", "concat", "concatenate"), linear=True, concatenates=True),
    Operation(("stack",), linear=True, stacks=True),
    Operation(
        ("slice", "index_select", "roll", "flip", "repeat", "repeat_interleave"), linear=True
    ),
    Operation(
        ("pad", "_pad"),
        layers=(
            nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d,
            nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad2d,
        ),
        linear=True,
    ),
    Operation(("fold", "unfold"), layers=(nn.Fold, nn.Unfold), linear=True, moves_dims=True),
    Operation(
        ("pixel_shuffle", "pixel_unshuffle"), layers=(nn.PixelShuffle, nn.PixelUnshuffle),
        linear=True, moves_dims=True,
    ),
    # Operations that return the values of their input.
    Operation(("identity",), layers=(nn.Identity,), linear=True, view=True, copies=True),
    Operation(("contiguous",), linear=True, view=True, copies=True, keeps_layout=True),
    Operation(("clone",), linear=True, copies=True, keeps_layout=True),
    Operation(functions=(no_shortcut,), linear=True, copies=True, keeps_layout=True),
    Operation(("detach", ), linear=True, view=True),
    Operation(
        ("to", "type_as", "float", "half", "bfloat16", "double"),
        linear=True, view=True, keeps_layout=True,
    ),
    Operation(("_assert",), linear=True),
    Operation(functions=(passed_through,), linear=True, view=True),
    # Pooling and resampling. "boolean_dispatch" and "fn" are wrappers in torch around max_pool.
    Operation(("sum",), linear=True, adds_entries=True),
    Operation(("mean",), linear=True),
    Operation(("max", "amax"), attributes=("values",), pools=True),
    Operation(
        (
            "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
            "adaptive_avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch",
            "fn",
        ),
        layers=(
            nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
            nn.AdaptiveAvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
        ),
        linear=True,
    ),
    Operation(("interpolate", "upsample"), layers=(nn.Upsample,), linear=True),
    Operation(("embedding",), layers=(nn.Embedding,), linear=True),
    # Norms.
    Operation(
        ("batch_norm",), layers=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        linear=True, batch_norm=True,
    ),
    Operation(("native_batch_norm",), batch_norm=True),
    Operation(
        ("instance_norm",), layers=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        linear=True,
    ),
    Operation(("group_norm",), layers=(nn.GroupNorm,), linear=True),
    Operation(
        ("layer_norm", "rms_norm"), layers=(nn.LayerNorm, nn.RMSNorm), linear=True,
        keeps_layout=True,
    ),
    # Layers whose input has the batch on the first dimension.
    Operation(layers=(ConvBase, BatchNormBase, nn.GroupNorm), batch_first=True),
    # Activations.
    Operation(("relu",), in_place=("relu_",), keeps_layout=True),
    Operation(("gelu", "silu", "tanh", "sigmoid"), keeps_layout=True),
    # Operations that drop, or that draw a drop mask.
    Operation(
        ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
        in_place=("dropout_", "alpha_dropout_"),
        layers=(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        linear=True, view=True,  # at a rate of 0 they return their input itself
        keeps_layout=True, drops=DropForm(),
    ),
    Operation(layers=(DropoutBase,), drops=DropForm()),
    Operation(("feature_alpha_dropout", "feature_dropout", "native_dropout"), drops=DropForm()),
    Operation(
        ("scaled_dot_product_attention",),
        drops=DropForm(
            parameters=("query", "key", "value", "attn_mask", "dropout_p"), default=0.0
        ),
    ),
    Operation(
        ("drop_path", "stochastic_depth"), layer_names=("DropPath", "StochasticDepth"),
        masks_branch=True, drops=DropForm(),
    ),
    Operation(
        (
            "cutout", "drop_block1d", "drop_block2d", "drop_block3d", "drop_block_2d",
            "drop_path_add", "gaussian_dropout", "path_drop", "shake_drop", "spatial_dropout",
            "uniform_dropout",
        ),
        drops=DropForm(),
    ),
    Operation(
        ("bernoulli",), in_place=("bernoulli_",), draws_mask=True, drops=DropForm(rates=()),
    ),
    Operation(in_place=("uniform_",), draws_mask=True),
    # Operations that create tensors.
    Operation(("rand",), factory=True, sizes=0, draws_mask=True),
    Operation(("empty", "ones"), factory=True, sizes=0),
    Operation(("new_empty", "new_ones"), sizes=1),
    Operation(("zeros",), linear=True, factory=True),
    Operation(("zeros_like", "new_zeros"), linear=True),
    Operation(
        (
            "arange", "as_tensor", "eye", "full", "linspace", "logspace", "normal", "randint",
            "randn", "randperm", "range", "scalar_tensor", "tensor",
        ),
        factory=True,
    ),
    # Properties of a tensor that do not depend on its values.
    Operation(
        (
            "size", "dim", "ndimension", "numel", "stride", "is_contiguous", "is_floating_point",
        ),
        attributes=("shape", "ndim", "dtype", "is_nested", "layout", "requires_grad"),
        reads_shape=True,
    ),
    Operation(
        ("get_device", "type"), attributes=("device", "is_cuda", "is_cpu"), reads_shape=True,
        reads_device=True,
    ),
)  # fmt: skip

_UNKNOWN = Operation()
_BY_NAME: dict[str, Operation] = {}
_BY_ATTRIBUTE: dict[str, Operation] = {}

for _entry in TABLE:
    _own = [f.__name__ for f in _entry.functions if inspect.isfunction(f)]
    for _key in (*_entry.names, *_entry.in_place, *_own):
        assert _key not in _BY_NAME, f"{_key} is in the table of operations twice"
        _BY_NAME[_key] = _entry
    for _key in _entry.attributes:
        assert _key not in _BY_ATTRIBUTE, f"{_key} is in the table of operations twice"
        _BY_ATTRIBUTE[_key] = _entry


def callee(node: fx.Node) -> str:
    """Return the name of the function or method that ``node`` calls, or the path of the module."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def named(name: str) -> Operation:
    """Return the entry of the function or method ``name``; one without properties if unknown."""
    return _BY_NAME.get(name, _UNKNOWN)


def attribute(name: str) -> Operation:
    """Return the entry of the attribute ``name``; one without properties if unknown."""
    return _BY_ATTRIBUTE.get(name, _UNKNOWN)


def operation_of(node: fx.Node) -> Operation:
    """Return the entry of the function, method or attribute that ``node`` stands for."""
    if node.op not in ("call_function", "call_method"):
        return _UNKNOWN
    if node.target is getattr:
        return attribute(str(node.args[1]))
    return named(callee(node))


def layers_with(*properties: str) -> tuple[type[nn.Module], ...]:
    """Return the layers whose entries have any of ``properties``."""
    return _layers_with(properties, TABLE)


@cache
def _layers_with(
    properties: tuple[str, ...], table: tuple[Operation, ...]
) -> tuple[type[nn.Module], ...]:
    wanted = (entry for entry in table if any(getattr(entry, p) for p in properties))
    return tuple(dict.fromkeys(layer for entry in wanted for layer in entry.layers))


def masks_branches(layer_name: str) -> bool:
    """Whether a class of this name drops whole residual branches by multiplying with a mask."""
    return any(entry.masks_branch and layer_name in entry.layer_names for entry in TABLE)


def names_of_additions() -> frozenset[str]:
    """Return the names of the functions and methods that may add a branch to a shortcut."""
    return frozenset(
        name
        for name, entry in _BY_NAME.items()
        if (entry.sum is not None and entry.sum.sign > 0)
        or entry.spelled_out is not None
        or entry.stacks
    )


def factories() -> tuple[Callable[..., Any], ...]:
    """Return the functions of torch that create a tensor without a tensor as their input."""
    return tuple(getattr(torch, name) for entry in TABLE if entry.factory for name in entry.names)


def in_place_operators() -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Yield each in-place operator (``x += y``) with its plain counterpart (``x + y``)."""
    for entry in TABLE:
        for name in entry.in_place:
            written = getattr(operator, name, None)
            plain = next((n for n in entry.names if n.rstrip("_") == name.removeprefix("i")), "")
            if written is not None and plain:
                yield written, getattr(operator, plain)


_NUMBER_FUNCTIONS = frozenset(
    function
    for entry in TABLE
    if entry.on_numbers
    for function in (
        *(getattr(operator, name) for name in entry.names if hasattr(operator, name)),
        *entry.functions,
    )
)


def works_on_numbers(function: Any) -> bool:
    """Whether ``function`` returns a number or a bool if its arguments are numbers."""
    return function in _NUMBER_FUNCTIONS or getattr(function, "__module__", None) == "math"


def is_function_of_table(function: Any) -> bool:
    """Whether the table describes ``function``, not another function of the same name."""
    name = getattr(function, "__name__", "")
    return any(getattr(library, name, None) is function for library in _LIBRARIES) or any(
        function is known for known in named(name).functions
    )


_LIBRARIES = (operator, torch, functional)


def writes_first_argument(node: fx.Node) -> bool:
    """Whether the function or method that ``node`` calls writes into its first argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    name, entry = callee(node), operation_of(node)
    # an unknown method whose name ends in one underscore writes, as all of torch's do
    trailing = name.endswith("_") and not name.endswith("__") and name not in entry.names
    inplace = node.op == "call_function" and node.kwargs.get("inplace") is True
    return name in entry.in_place or trailing or inplace
