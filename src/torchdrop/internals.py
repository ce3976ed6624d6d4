"""Every private PyTorch API that torchdrop uses, each under a name of its own.

Private means: a name with a leading underscore, or an attribute that PyTorch does not document. A
release of PyTorch may change any of them. Each entry says what it is for and what happens without
it; ``tests/test_internals.py`` tries each on this version of PyTorch, and checks that no other file
uses a private API. There are three ways of going on where one is missing:

* where results would be wrong, importing torchdrop fails (or the call that needs it does), with an
  error that names the API;
* where only time or memory is lost, a warning is given once, and torchdrop goes on;
* where PyTorch ignores what torchdrop sets (marks for the compiler), nothing can be noticed while
  running, and only the test tells.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

try:
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
    from torch.nn.modules.conv import _ConvNd as ConvBase
    from torch.nn.modules.dropout import _DropoutNd as DropoutBase
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as AttentionOutputLinear
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._python_dispatch import _disable_current_modes as disable_dispatch_modes
    from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
except ImportError as error:
    raise ImportError(
        f"torchdrop uses a private API that PyTorch {torch.__version__} does not have ({error}); "
        f"install a newer torchdrop, or an older PyTorch"
    ) from error

__all__ = [
    "MODULE_DICTS",
    "AttentionOutputLinear",
    "BatchNormBase",
    "ConvBase",
    "DisableTorchFunction",
    "DropoutBase",
    "NotAParameter",
    "TorchDispatchMode",
    "any_autocast_enabled",
    "base_of",
    "buffers_of",
    "call_by_full_name",
    "clear_forward_hooks",
    "count_dispatch_modes",
    "count_flops_without_modules",
    "count_references",
    "cpu_attention_operations",
    "disable_dispatch_modes",
    "dynamo_was_imported",
    "fake_tensor_mode",
    "forward_hooks_of",
    "forward_pre_hooks_of",
    "functorch_transforms_active",
    "has_backward_hooks",
    "in_backward_pass",
    "innermost_saved_tensor_hooks",
    "is_data_dependent_error",
    "is_legacy_batched_tensor",
    "leave_frame_uncompiled",
    "mark_first_size_symbolic",
    "may_be_saved_by_producer",
    "modifications_of",
    "parameters_of_tree",
    "replicate_for_data_parallel",
    "reserve_name",
    "saved_by_producer",
    "set_replicate_method",
    "tensors_of_tracer",
    "tree_flatten",
    "tree_map_only",
    "tree_unflatten",
    "unset_replicate_method",
    "vmap_draws_differently",
    "wrap_functions_of",
]


def _required(path: str) -> Any:
    """Return the object at the dotted ``path`` in torch, or fail to import torchdrop."""
    found: Any = torch
    for name in path.split(".")[1:]:
        if not hasattr(found, name):
            raise ImportError(
                f"torchdrop uses {path}, a private API that PyTorch {torch.__version__} does not "
                f"have; install a newer torchdrop, or an older PyTorch"
            )
        found = getattr(found, name)
    return found


@cache
def _warn_once(api: str, consequence: str) -> None:
    warnings.warn(
        f"PyTorch {torch.__version__} does not have {api}, or it behaves differently: "
        f"{consequence}; install a newer torchdrop, or an older PyTorch",
        RuntimeWarning,
        stacklevel=3,
    )


# Classes and functions in Python ------------------------------------------------------------------
# Without any of them torchdrop cannot be imported.
#
# BatchNormBase (torch.nn.modules.batchnorm._BatchNorm): the base class of every batch
#   normalization, SyncBatchNorm included. A branch with one needs two values a channel.
# ConvBase (torch.nn.modules.conv._ConvNd): the base class of every convolution. It tells that the
#   batch is on dimension 0, and is how the number of rows that inductor may not know is found.
# DropoutBase (torch.nn.modules.dropout._DropoutNd): the base class of torch's dropouts.
# AttentionOutputLinear (torch.nn.modules.linear.NonDynamicallyQuantizableLinear): the linear layer
#   in nn.MultiheadAttention of which only the weights are used: its forward is never called.
# TorchDispatchMode (torch.utils._python_dispatch): to see each operation, for random draws.
# disable_dispatch_modes (torch.utils._python_dispatch._disable_current_modes): a context without
#   the dispatch modes that are active, so that neither those of the user nor torchdrop's own see
#   the operations by which shapes are worked out.
# tree_flatten, tree_unflatten, tree_map_only (torch.utils._pytree): the tensors in nested
#   containers, as PyTorch itself finds them.


# What is active around a call ---------------------------------------------------------------------

#: Whether a torch.func transform (vmap, grad, jvp) is active. Under one, torchdrop's own autograd
#: functions do not work and PyTorch's operations are used. Without it torchdrop cannot be imported.
functorch_transforms_active: Callable[[], bool] = _required(
    "torch._C._are_functorch_transforms_active"
)

#: How many dispatch modes are active (fake tensors, make_fx, a FLOP counter). Under one, random
#: numbers are not read on the host, or a traced graph would hold them as constants. Without it
#: torchdrop cannot be imported.
count_dispatch_modes: Callable[[], int] = _required("torch._C._len_torch_dispatch_stack")

#: Whether a tensor belongs to ``autograd.grad(is_grads_batched=True)``, which stands for many
#: gradients at once. Its memory must not be written into, nor its values be read on the host.
#: Without it torchdrop cannot be imported.
is_legacy_batched_tensor: Callable[[Tensor], bool] = _required(
    "torch._C._functorch.is_legacy_batchedtensor"
)

#: Whether autocast is enabled for any device. It is asked first in every call, since asking for one
#: device takes longer. Without it torchdrop cannot be imported.
any_autocast_enabled: Callable[[], bool] = _required("torch._C._is_any_autocast_enabled")

#: A context without ``__torch_function__``, neither of modes nor of tensor subclasses, in which
#: shapes are worked out unobserved. Without it torchdrop cannot be imported.
DisableTorchFunction: Any = _required("torch._C.DisableTorchFunction")

_current_graph_task_id: Callable[[], int] = _required("torch._C._current_graph_task_id")


def in_backward_pass() -> bool:
    """Whether a backward pass is running in this thread.

    Uses ``torch._C._current_graph_task_id``. Activation checkpointing runs a block again inside the
    backward pass; that repeats a decision, and must not count as a new one. Without it torchdrop
    cannot be imported.
    """
    return _current_graph_task_id() != -1


def vmap_draws_differently() -> bool:
    """Whether ``vmap(randomness="different")`` is active.

    Uses the stack of interpreters in ``torch._C._functorch``. Rows are drawn once for everything
    that vmap maps over, so this setting has to be refused. Without it every vmap is refused.

    Raises:
        RuntimeError: PyTorch does not tell.
    """
    if not functorch_transforms_active():
        return False
    try:
        functorch = torch._C._functorch
        vmap, different = functorch.TransformType.Vmap, functorch.RandomnessType.Different
        return any(
            level.key() == vmap and functorch.CVmapInterpreterPtr(level).randomness() == different
            for level in functorch.get_interpreter_stack() or ()
        )
    except AttributeError as error:
        raise RuntimeError(
            f"torchdrop has to know with which randomness vmap runs, which PyTorch "
            f"{torch.__version__} does not tell (torch._C._functorch: {error}); install a newer "
            f"torchdrop, or an older PyTorch"
        ) from error


# Tensors ------------------------------------------------------------------------------------------


def modifications_of(tensor: Tensor) -> int:
    """Return how often the memory of ``tensor`` was written into: ``Tensor._version``.

    By this a branch that writes into its input is noticed, and a tensor that was written into
    before the backward pass. Without it the calls that ask for it raise an AttributeError.

    Raises:
        RuntimeError: ``tensor`` is an inference tensor, which does not count.
    """
    return tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """Return the tensor that ``tensor`` is a view of, or None: ``Tensor._base``.

    A view shares its memory: who writes into it writes into the base, and who keeps it keeps all of
    the base. Without it the calls that ask for it raise an AttributeError.
    """
    return tensor._base


_tensor_use_count: Any = getattr(Tensor, "_use_count", None)
_storage_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)


def count_references(tensors: tuple[Tensor, ...]) -> tuple[int, int, int] | None:
    """Return how many references there are to the first of ``tensors``.

    A gradient to which nothing else has a reference may be written into, as autograd itself does. A
    count that misses a reference would give wrong gradients, so the first call checks that each
    kind of reference is counted. Uses ``Tensor._use_count``, ``torch._C._storage_Use_Count`` and
    ``UntypedStorage._cdata``. Without them gradients are copied, and a warning is given once.

    Returns:
        The references to the tensor from Python and from C++, and those to its memory; None if they
        cannot be counted.
    """
    first: Any = tensors[0]
    if type(first) is not Tensor or is_legacy_batched_tensor(first) or not _counts_references():
        return None
    return _count(tensors)


def _count(tensors: tuple[Tensor, ...]) -> tuple[int, int, int]:
    first: Any = tensors[0]
    storage = first.untyped_storage()
    memory = _storage_use_count(storage._cdata) + sys.getrefcount(storage)
    return sys.getrefcount(first), _tensor_use_count(first), memory


@cache
def _counts_references() -> bool:
    """Whether each kind of reference to a tensor is counted by :func:`_count`."""
    try:
        with DisableTorchFunction(), disable_dispatch_modes(), torch.inference_mode(False):
            leaf = torch.ones(2, device="cpu", requires_grad=True)
            mine = (torch.ones(2, device="cpu"),)
            alone = _count(mine)
            name = mine[0]
            by_python = _count(mine)
            del name
            part = mine[0][1:]
            by_part = _count(mine)
            del part
            leaf.grad = mine[0]
            by_torch = _count(mine)
            leaf.grad = None
            works = (
                by_python[0] > alone[0]
                and by_part[2] > alone[2]
                and by_torch[1] > alone[1]
                and _count(mine) == alone
            )
    except (AttributeError, TypeError):
        works = False
    if not works:
        _warn_once(
            "Tensor._use_count, torch._C._storage_Use_Count or UntypedStorage._cdata",
            "the backward pass of torchdrop copies gradients that it could write into",
        )
    return works


# The backward pass --------------------------------------------------------------------------------

# The attributes under which an autograd node saves its own output (ReLU, sigmoid, softmax, an
# autograd function in Python). Only the class is asked: to read one from the node would unpack the
# saved tensor, which in a checkpointed region starts the recomputation.
_SAVED_OUTPUT = ("_saved_result", "_saved_result0", "_saved_output", "saved_tensors")


def saved_by_producer(tensor: Tensor) -> bool:
    """Whether the operation that made ``tensor`` saves it for backward, as ReLU saves its result.

    Uses the name ``_saved_result`` of the classes of autograd nodes. Rows of such a tensor need not
    be saved a second time. Without it they are: more memory, and a warning is given once.
    """
    _check_saved_names()
    return tensor.grad_fn is not None and hasattr(type(tensor.grad_fn), "_saved_result")


def may_be_saved_by_producer(tensor: Tensor) -> bool:
    """Whether the operation that made ``tensor`` may save it for backward, by whatever name.

    Uses the names ``_saved_result``, ``_saved_result0``, ``_saved_output`` and ``saved_tensors`` of
    the classes of autograd nodes. A tensor that is saved must not be written into. If a name is
    missing, PyTorch's backward pass raises an error about such a write; for the first name a
    warning is given once as well.
    """
    _check_saved_names()
    return any(hasattr(type(tensor.grad_fn), name) for name in _SAVED_OUTPUT)


@cache
def _check_saved_names() -> None:
    with torch.enable_grad(), torch.inference_mode(False):
        node = torch.zeros(1, device="cpu", requires_grad=True).relu().grad_fn
    if not hasattr(type(node), "_saved_result"):
        _warn_once(
            "_saved_result on the autograd node of ReLU",
            "rows of a tensor that PyTorch saves for backward are saved a second time",
        )


def innermost_saved_tensor_hooks() -> tuple[bool, Any]:
    """Return whether saved-tensor hooks may be set now, and the innermost pair that is set.

    Uses ``torch._C._autograd._saved_tensors_hooks_is_enabled`` and
    ``_top_saved_tensors_default_hooks``. torchdrop's own hooks have to call those of others, of
    which PyTorch calls the innermost pair alone. Without it torchdrop sets no hooks of its own:
    rows are saved besides the tensor that they were taken from, and a warning is given once.

    Returns:
        ``(False, None)`` where hooks must not be set; else True and the pair, or None.
    """
    autograd: Any = torch._C._autograd
    try:
        if not autograd._saved_tensors_hooks_is_enabled():
            return False, None
        return True, autograd._top_saved_tensors_default_hooks(False)
    except AttributeError:
        _warn_once(
            "torch._C._autograd._top_saved_tensors_default_hooks",
            "kept rows are saved for backward besides the tensor that they were taken from",
        )
        return False, None


# Modules ------------------------------------------------------------------------------------------

#: The attributes of a module that hold its parameters, buffers and children.
MODULE_DICTS = ("_parameters", "_buffers", "_modules")


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dictionary of the buffers of ``module`` itself: ``nn.Module._buffers``.

    An entry is replaced while a diagnostic runs, also where the class of the module refuses to set
    the attribute. Without it the calls that ask for it raise an AttributeError.
    """
    return module._buffers


def parameters_of_tree(module: nn.Module) -> list[Tensor]:
    """Return the parameters of ``module`` and its descendants, tied ones twice.

    Uses ``nn.Module._parameters`` and ``nn.Module._modules``; ``parameters()`` takes several times
    as long, and this is asked in every call of a branch that was dropped. Without them the call
    raises an AttributeError.
    """
    found: list[Tensor] = [p for p in module._parameters.values() if p is not None]
    for child in module._modules.values():
        if child is not None:
            found += parameters_of_tree(child)
    return found


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has backward hooks: ``_backward_hooks`` and ``_backward_pre_hooks``.

    A module whose children are run one by one cannot call them, which is an error. Without the
    attributes the call raises an AttributeError.
    """
    return bool(module._backward_hooks or module._backward_pre_hooks)


def forward_pre_hooks_of(module: nn.Module) -> Iterator[tuple[Callable[..., Any], bool]]:
    """Give each forward pre-hook of ``module``, and whether it takes keyword arguments.

    Uses ``nn.Module._forward_pre_hooks``. Of a module whose children are run one by one, torchdrop
    calls the hooks. Without the attributes the call raises an AttributeError.
    """
    for number, hook in module._forward_pre_hooks.items():
        yield hook, number in module._forward_pre_hooks_with_kwargs


def forward_hooks_of(module: nn.Module) -> Iterator[tuple[Callable[..., Any], bool]]:
    """Give each forward hook of ``module``, and whether it takes keyword arguments.

    Uses ``nn.Module._forward_hooks``, see :func:`forward_pre_hooks_of`.
    """
    for number, hook in module._forward_hooks.items():
        yield hook, number in module._forward_hooks_with_kwargs


def clear_forward_hooks(module: nn.Module) -> None:
    """Remove all forward hooks and pre-hooks from ``module`` itself, a copy of the user's.

    Uses ``nn.Module._forward_hooks`` and ``_forward_pre_hooks``. Shapes are worked out on a copy,
    of which the user's hooks must not hear. Without the attributes the call raises an
    AttributeError.
    """
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()


_REPLICATE = "_replicate_for_data_parallel"


def replicate_for_data_parallel(module: nn.Module) -> nn.Module:
    """Return a replica of ``module``, as ``nn.DataParallel`` makes one for each device.

    Uses the method ``nn.Module._replicate_for_data_parallel`` of the class.
    """
    replica: nn.Module = getattr(type(module), _REPLICATE)(module)
    return replica


def set_replicate_method(module: nn.Module, method: Callable[[], nn.Module]) -> None:
    """Let ``nn.DataParallel`` call ``method`` to make a replica of ``module``.

    Sets ``_replicate_for_data_parallel`` on the instance. Without it a replica would run the
    parameters of the original module, so a warning is given once.
    """
    if not hasattr(type(module), _REPLICATE):
        _warn_once(
            f"nn.Module.{_REPLICATE}",
            "a model with stochastic depth must not be used in nn.DataParallel (use "
            "DistributedDataParallel)",
        )
    object.__setattr__(module, _REPLICATE, method)


def unset_replicate_method(module: nn.Module) -> None:
    """Undo :func:`set_replicate_method`, where it was done."""
    module.__dict__.pop(_REPLICATE, None)


# torch.fx -----------------------------------------------------------------------------------------


class NotAParameter:
    """Base class of objects of which ``isinstance(x, nn.Parameter)`` is False, and asks no more.

    Sets ``_is_param``, which the metaclass of nn.Parameter reads. A proxy answers every attribute
    with a proxy, whose truth is not known, and a forward that asks could not be traced.
    """

    _is_param = False


def reserve_name(graph: fx.Graph, name: str) -> None:
    """Let no node of ``graph`` have the name ``name``: ``fx.Graph._graph_namespace``.

    The generated function has an argument of that name. Without it the call raises an
    AttributeError while stochastic depth is added.
    """
    graph._graph_namespace.create_name(name, None)


def wrap_functions_of(tracer: fx.Tracer, module: ModuleType) -> None:
    """Let ``tracer`` record the functions that were wrapped in ``module``.

    Appends to ``fx.Tracer._autowrap_search``: PyTorch's factories (``torch.zeros``) have to be
    recorded also where a forward finds them in torch itself. Without it the call raises an
    AttributeError while a block is read.
    """
    search: Any = tracer._autowrap_search
    search.append(module)


def tensors_of_tracer(tracer: fx.Tracer) -> dict[Any, Any]:
    """Return the tensors that are attributes of the traced module: ``fx.Tracer.tensor_attrs``.

    Any other tensor that an operation is recorded with does not come from the inputs, and is
    refused. Without it the call raises an AttributeError while a block is read.
    """
    found: dict[Any, Any] = tracer.tensor_attrs
    return found


def call_by_full_name(node: fx.Node) -> None:
    """Let the code of a graph call the target of ``node`` by its full name.

    Removes ``node.meta["is_wrapped"]``, which fx sets for the functions that it wrapped: their
    names are taken from the module around the graph, and generated code has none. If PyTorch names
    it differently, generated code raises a NameError on its first call.
    """
    node.meta.pop("is_wrapped", None)


def fake_tensor_mode() -> Any:
    """Return a mode in which tensors have shapes and dtypes, but no data.

    Uses ``torch._subclasses.fake_tensor.FakeTensorMode``, imported here, since its first use takes
    a second or more. Shapes of the values in a forward are worked out under it.

    Raises:
        ImportError: PyTorch does not have it.
    """
    fake_tensor: Any = importlib.import_module("torch._subclasses.fake_tensor")
    return fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)


def is_data_dependent_error(error: BaseException) -> bool:
    """Whether ``error`` says that a fake tensor was asked for data, or for a shape that needs data.

    Goes by the names of two classes in ``torch._subclasses.fake_tensor``. If they had other names,
    the reason that the plan gives would be less precise.
    """
    names = ("DataDependentOutputException", "DynamicOutputShapeException")
    return type(error).__name__ in names


# torch.compile ------------------------------------------------------------------------------------


def dynamo_was_imported() -> bool:
    """Whether ``torch._dynamo`` was imported. If not, nothing is compiled, and it takes seconds."""
    return "torch._dynamo" in sys.modules


def mark_first_size_symbolic(tensor: Tensor, *, value_known: bool, largest: int, hint: int) -> None:
    """Let a compiler treat the size of dimension 0 of ``tensor`` as a symbol, not as a constant.

    Sets the attributes that ``torch._dynamo.maybe_mark_dynamic`` and ``mark_unbacked`` set; to
    import ``torch._dynamo`` takes seconds. If PyTorch reads other attributes, each drop rate is
    compiled anew, which nothing but the test notices.

    Args:
        tensor: A tensor that a compiled function will read.
        value_known: Whether the compiler knows the value that the size has now, and may compile
            anew when a decision by that value changes.
        largest: The size is between 1 and this, if its value is not known.
        hint: The size for which loops are planned, if its value is not known.
    """
    marks: dict[str, Any]
    if value_known:
        marks = {"_dynamo_weak_dynamic_indices": {0}}
    else:
        marks = {
            "_dynamo_unbacked_indices": {0},
            "_dynamo_unbacked_bounds": {0: (1, largest)},
            "_dynamo_hint_overrides": {0: hint},
            "_specialize_on": {0: []},
        }
    for name, value in marks.items():
        setattr(tensor, name, value)
    tensor._has_dynamo_dim_marking = True  # type: ignore[attr-defined]


def leave_frame_uncompiled(code: CodeType) -> None:
    """Let dynamo not compile ``code`` by itself, but still compile the functions that it calls.

    Does what ``torch._dynamo.skip`` does, by ``torch._C._dynamo.eval_frame``; to import
    ``torch._dynamo`` takes seconds. Without it dynamo compiles torchdrop's own functions for each
    block until its limit is reached, then stops compiling; a warning is given once.
    """
    frames: Any = torch._C._dynamo.eval_frame
    try:
        action = frames._FrameAction
        strategy = frames._FrameExecStrategy(action.SKIP, action.DEFAULT)
        frames.set_code_exec_strategy(code, strategy)
    except (AttributeError, TypeError):
        _warn_once(
            "torch._C._dynamo.eval_frame.set_code_exec_strategy",
            "torch.compile compiles torchdrop's own functions in batch mode, anew for each block",
        )


# Counting operations ------------------------------------------------------------------------------


class _NoModules:
    """Used in place of the module tracker of a FLOP counter."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def count_flops_without_modules(mode: Any) -> None:
    """Let a ``FlopCounterMode`` count the total alone, and nothing for each module.

    Replaces ``FlopCounterMode.mod_tracker``, whose hooks on the gradients of every module are most
    of the time that counting takes, and which raises on views of parameters that were made without
    gradients. If PyTorch names it differently, counting is slow and may raise; a warning is given
    once.
    """
    if not hasattr(mode, "mod_tracker"):
        _warn_once("FlopCounterMode.mod_tracker", "counting FLOPs is slow, and may fail")
    mode.mod_tracker = _NoModules()


def cpu_attention_operations() -> tuple[Any, Any] | None:
    """Return the operations of fused attention on the CPU, forward and backward.

    These are ``torch.ops.aten._scaled_dot_product_flash_attention_for_cpu`` and its ``_backward``.
    PyTorch counts the FLOPs of the kernels for accelerators only. Without them attention on the CPU
    is not counted, and a warning is given once.
    """
    name = "_scaled_dot_product_flash_attention_for_cpu"
    try:
        return getattr(torch.ops.aten, name), getattr(torch.ops.aten, f"{name}_backward")
    except AttributeError:
        _warn_once(f"torch.ops.aten.{name}", "FLOPs of attention on the CPU are not counted")
        return None
