"""Each private PyTorch API that torchdrop uses, tried on this version of PyTorch.

If a probe fails after PyTorch was updated, its message names the API and what torchdrop uses it
for; ``src/torchdrop/internals.py`` is the one file to change.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.nn import parallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from torchdrop import internals


class Probe(NamedTuple):
    names: tuple[str, ...]  # in internals
    api: str
    purpose: str
    run: Callable[[], None]


PROBES: list[Probe] = []


def probe(*names: str, api: str, purpose: str) -> Callable[[Callable[[], None]], None]:
    def add(run: Callable[[], None]) -> None:
        PROBES.append(Probe(names, api, purpose, run))

    return add


def check(found: Probe) -> None:
    try:
        found.run()
    except Exception as error:
        pytest.fail(
            f"PyTorch {torch.__version__} changed {found.api}, which torchdrop uses to "
            f"{found.purpose} (internals.{', '.join(found.names)}): {type(error).__name__} {error}"
        )


# Classes and functions in Python


@probe(
    "BatchNormBase",
    api="torch.nn.modules.batchnorm._BatchNorm",
    purpose="find every kind of batch normalization",
)
def _() -> None:
    layers = (nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2))
    assert all(isinstance(layer, internals.BatchNormBase) for layer in layers)
    assert isinstance(nn.LazyBatchNorm2d(), internals.BatchNormBase)
    assert not isinstance(nn.GroupNorm(1, 2), internals.BatchNormBase)


@probe("ConvBase", api="torch.nn.modules.conv._ConvNd", purpose="find every kind of convolution")
def _() -> None:
    for ndim in (1, 2, 3):
        for kind in (f"Conv{ndim}d", f"ConvTranspose{ndim}d"):
            assert isinstance(getattr(nn, kind)(2, 2, 1), internals.ConvBase), kind
    assert not isinstance(nn.Linear(2, 2), internals.ConvBase)


@probe("DropoutBase", api="torch.nn.modules.dropout._DropoutNd", purpose="find every dropout")
def _() -> None:
    names = (
        "Dropout",
        "Dropout1d",
        "Dropout2d",
        "Dropout3d",
        "AlphaDropout",
        "FeatureAlphaDropout",
    )
    assert all(isinstance(getattr(nn, name)(0.1), internals.DropoutBase) for name in names)
    assert not isinstance(nn.Identity(), internals.DropoutBase)


@probe(
    "AttentionOutputLinear",
    api="torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
    purpose="leave out the linear layer of attention whose forward is never called",
)
def _() -> None:
    attention = nn.MultiheadAttention(4, 2)
    called: list[nn.Module] = []
    for module in attention.modules():
        if isinstance(module, nn.Linear):
            assert type(module) is internals.AttentionOutputLinear
            module.register_forward_hook(lambda module, args, out: called.append(module))
    x = torch.randn(3, 1, 4)
    attention(x, x, x)
    assert called == []


class Seen(internals.TorchDispatchMode):
    """Records the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(func)
        return func(*args, **(kwargs or {}))


@probe(
    "TorchDispatchMode",
    "disable_dispatch_modes",
    api="TorchDispatchMode or _disable_current_modes of torch.utils._python_dispatch",
    purpose="see random draws, and to work out shapes unseen by the user's modes",
)
def _() -> None:
    with Seen() as outer, Seen() as inner:
        torch.rand(2)
        assert torch.Tag.nondeterministic_seeded in inner.operations[-1].tags
        assert len(outer.operations) == len(inner.operations) == 1
        with internals.disable_dispatch_modes():
            torch.rand(2)
        assert len(outer.operations) == len(inner.operations) == 1
        torch.rand(2)
    assert len(outer.operations) == len(inner.operations) == 2


@probe(
    "tree_flatten",
    "tree_unflatten",
    "tree_map_only",
    api="torch.utils._pytree",
    purpose="find the tensors in nested containers",
)
def _() -> None:
    x, y = torch.ones(1), torch.zeros(1)
    tree = {"a": [x, 1], "b": (y, None)}
    leaves, structure = internals.tree_flatten(tree)
    assert [id(leaf) for leaf in leaves] == [id(x), id(1), id(y), id(None)]
    assert internals.tree_unflatten(leaves, structure)["b"][0] is y
    doubled = internals.tree_map_only(torch.Tensor, lambda t: t + 1, tree)
    assert doubled == {"a": [torch.tensor([2.0]), 1], "b": (torch.tensor([1.0]), None)}


# What is active around a call


@probe(
    "functorch_transforms_active",
    api="torch._C._are_functorch_transforms_active",
    purpose="use PyTorch's own operations under torch.func, where torchdrop's do not work",
)
def _() -> None:
    seen: list[bool] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.functorch_transforms_active())
        return x.sum()

    x = torch.ones(2)
    f(x), torch.func.vmap(f)(torch.ones(2, 2)), torch.func.grad(f)(x), f(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(f, (x,), (x,))
    assert seen == [False, True, True, False, True]


@probe(
    "count_dispatch_modes",
    api="torch._C._len_torch_dispatch_stack",
    purpose="read no random numbers on the host while a graph is traced",
)
def _() -> None:
    assert internals.count_dispatch_modes() == 0
    with Seen():
        assert internals.count_dispatch_modes() == 1
        with FakeTensorMode():
            assert internals.count_dispatch_modes() == 2
    assert internals.count_dispatch_modes() == 0


@probe(
    "is_legacy_batched_tensor",
    api="torch._C._functorch.is_legacy_batchedtensor",
    purpose="not write into a gradient that stands for several",
)
def _() -> None:
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 1.0
    y.register_hook(lambda grad: seen.append(internals.is_legacy_batched_tensor(grad)))
    torch.autograd.grad(y, x, torch.ones(2), retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(3, 2), is_grads_batched=True)
    assert seen == [False, True]


@probe(
    "any_autocast_enabled",
    api="torch._C._is_any_autocast_enabled",
    purpose="know the dtype of a sum under autocast",
)
def _() -> None:
    assert not internals.any_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert internals.any_autocast_enabled()
        with torch.autocast("cpu", enabled=False):
            assert not internals.any_autocast_enabled()


@probe(
    "DisableTorchFunction",
    api="torch._C.DisableTorchFunction",
    purpose="work out shapes unseen by torch function modes and tensor subclasses",
)
def _() -> None:
    class Sub(torch.Tensor):
        pass

    with torch.device("meta"):
        assert torch.ones(1).is_meta
        with internals.DisableTorchFunction():
            assert not torch.ones(1).is_meta
    x = torch.ones(2).as_subclass(Sub)
    assert type(x + 1) is Sub
    with internals.DisableTorchFunction():
        assert type(x + 1) is torch.Tensor


@probe(
    "in_backward_pass",
    api="torch._C._current_graph_task_id",
    purpose="not count what a checkpoint computes again in the backward pass",
)
def _() -> None:
    for use_reentrant in (True, False):
        seen: list[bool] = []

        def f(x: torch.Tensor, seen: list[bool] = seen) -> torch.Tensor:
            seen.append(internals.in_backward_pass())
            return x.exp()

        x = torch.ones(2, requires_grad=True)
        checkpoint(f, x, use_reentrant=use_reentrant).sum().backward()
        assert seen == [False, True]
        assert not internals.in_backward_pass()


@probe(
    "vmap_draws_differently",
    api="the interpreter stack in torch._C._functorch",
    purpose="refuse vmap(randomness='different')",
)
def _() -> None:
    seen: list[bool] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.vmap_draws_differently())
        return x.sum()

    x = torch.ones(2, 2)
    f(x)
    for randomness in ("error", "same", "different"):
        torch.func.vmap(f, randomness=randomness)(x)
    torch.func.vmap(torch.func.grad(f), randomness="different")(x)
    torch.func.grad(f)(x)
    assert seen == [False, False, False, True, True, False]


# Tensors


@probe(
    "modifications_of",
    api="Tensor._version",
    purpose="notice a branch that writes into its input",
)
def _() -> None:
    x = torch.ones(4)
    before = internals.modifications_of(x)
    x + 1, x.detach(), x[1:]
    assert internals.modifications_of(x) == before
    x.add_(1)
    x[1:].zero_()
    x.detach().mul_(2)
    assert internals.modifications_of(x) == before + 3
    with torch.inference_mode():
        inference = torch.ones(1)
    with pytest.raises(RuntimeError, match="version counter"):
        internals.modifications_of(inference)


@probe("base_of", api="Tensor._base", purpose="find the tensor whose memory a view uses")
def _() -> None:
    x = torch.ones(4, requires_grad=True) * 1.0
    assert internals.base_of(x) is None
    assert internals.base_of(x[1:].view(3, 1)) is x
    assert internals.base_of(x.clone()) is None


@probe(
    "count_references",
    api="Tensor._use_count, torch._C._storage_Use_Count or UntypedStorage._cdata",
    purpose="write into a gradient only if nothing else refers to it",
)
def _() -> None:
    found: list[Any] = []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            found.append(internals.count_references(grads))
            return grads[0]

    def count(keep: Callable[[torch.Tensor], Any]) -> Any:
        kept: list[Any] = []
        leaf = torch.ones(3, requires_grad=True)
        y = Count.apply(leaf * 1.0)
        y.register_hook(lambda grad: kept.append(keep(grad)))
        (y * 2.0).sum().backward()
        return found.pop()

    def as_gradient(grad: torch.Tensor) -> torch.Tensor:
        leaf = torch.zeros(3, requires_grad=True)
        leaf.grad = grad
        return leaf

    def saved(grad: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return torch.ones(3, requires_grad=True) * grad

    assert internals._counts_references()
    alone = count(lambda grad: None)
    assert alone is not None
    assert count(lambda grad: grad.sum().item()) == alone
    holders = (
        lambda grad: grad,
        lambda grad: grad[1:],
        torch.Tensor.detach,
        torch.Tensor.numpy,
        torch.Tensor.untyped_storage,
        as_gradient,
        saved,
    )
    for number, keep in enumerate(holders):
        assert count(keep) != alone, f"holder {number} is not counted"
    assert internals.count_references((nn.Parameter(torch.ones(1)),)) is None


# The backward pass


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = x.square()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (out,) = ctx.saved_tensors
        return 2 * out.sqrt() * grads[0]


def raises_if_written_into(y: torch.Tensor) -> bool:
    y.detach().zero_()
    try:
        y.sum().backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


@probe(
    "saved_by_producer",
    "may_be_saved_by_producer",
    api="_saved_result, _saved_result0 or _saved_output on the classes of autograd nodes",
    purpose="know which tensors PyTorch saves for backward",
)
def _() -> None:
    def leaf() -> torch.Tensor:
        return torch.rand(2, 3, requires_grad=True)

    for make in (torch.relu, torch.sigmoid, torch.tanh, torch.exp, lambda x: x.softmax(1)):
        assert internals.saved_by_producer(make(leaf()))
        assert internals.may_be_saved_by_producer(make(leaf()))
        assert raises_if_written_into(make(leaf()))
    for make in (torch.neg, torch.abs, F.gelu, F.softplus, lambda x: x + 1, lambda x: x @ x.mT):
        assert not internals.saved_by_producer(make(leaf()))
        assert not internals.may_be_saved_by_producer(make(leaf()))
        assert not raises_if_written_into(make(leaf()))
    x = torch.rand(2, 2, 3, 4, requires_grad=True)
    scores = torch.rand(6, 2, 5, requires_grad=True).log_softmax(2)
    sizes = torch.full((2,), 6), torch.full((2,), 3)
    others = (
        Square.apply(leaf()),  # saved_tensors
        F.scaled_dot_product_attention(x, x, x),  # _saved_output
        F.ctc_loss(scores, torch.ones(2, 3).long(), *sizes, reduction="none"),  # _saved_result0
    )
    for tensor in others:
        assert internals.may_be_saved_by_producer(tensor)
        assert not internals.saved_by_producer(tensor)
    assert not internals.saved_by_producer(leaf())


@probe(
    "innermost_saved_tensor_hooks",
    api="_saved_tensors_hooks_is_enabled or _top_saved_tensors_default_hooks of torch._C._autograd",
    purpose="hand saved tensors to the hooks of an outer context",
)
def _() -> None:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    assert internals.innermost_saved_tensor_hooks() == (True, None)
    with saved_tensors_hooks(str, str), saved_tensors_hooks(pack, unpack):
        assert internals.innermost_saved_tensor_hooks() == (True, (pack, unpack))
    with disable_saved_tensors_hooks("not here"):
        assert internals.innermost_saved_tensor_hooks() == (False, None)
    assert internals.innermost_saved_tensor_hooks() == (True, None)


# Modules


@probe(
    "MODULE_DICTS",
    "buffers_of",
    "parameters_of_tree",
    api="_parameters, _buffers or _modules of nn.Module",
    purpose="reach the tensors and children of a module quickly, and replace buffers",
)
def _() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())
    model.append(model[0])
    assert [id(p) for p in internals.parameters_of_tree(model)] == [
        id(p) for p in (*model[0].parameters(), *model[1].parameters(), *model[0].parameters())
    ]
    buffers = internals.buffers_of(model[1])
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    mean = buffers["running_mean"] = torch.full((2,), 7.0)
    assert model[1].running_mean is mean
    assert model.state_dict()["1.running_mean"].tolist() == [7.0, 7.0]
    assert set(internals.MODULE_DICTS) <= set(model.__dict__)


@probe(
    "has_backward_hooks",
    "forward_pre_hooks_of",
    "forward_hooks_of",
    "clear_forward_hooks",
    api="the dictionaries of hooks of nn.Module",
    purpose="call the hooks of a child whose own children it runs one by one",
)
def _() -> None:
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        module = nn.ReLU()
        assert not internals.has_backward_hooks(module)
        handle = getattr(module, register)(lambda *args: None)
        assert internals.has_backward_hooks(module)
        handle.remove()
        assert not internals.has_backward_hooks(module)

    def plain(*args: Any) -> None:
        calls.append("plain")

    def named(*args: Any) -> None:
        calls.append("named")

    calls: list[str] = []
    module = nn.ReLU()
    module.register_forward_pre_hook(plain)
    module.register_forward_pre_hook(named, with_kwargs=True)
    module.register_forward_hook(named, with_kwargs=True)
    module.register_forward_hook(plain)
    assert list(internals.forward_pre_hooks_of(module)) == [(plain, False), (named, True)]
    assert list(internals.forward_hooks_of(module)) == [(named, True), (plain, False)]
    module(torch.ones(1))
    assert calls == ["plain", "named", "named", "plain"]
    internals.clear_forward_hooks(module)
    module(torch.ones(1))
    assert len(calls) == 4


@probe(
    "replicate_for_data_parallel",
    "set_replicate_method",
    "unset_replicate_method",
    api="nn.Module._replicate_for_data_parallel",
    purpose="let the replicas of nn.DataParallel run their own parameters",
)
def _() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    module = Scale()
    calls: list[nn.Module] = []

    def replica_of_module() -> nn.Module:
        replica = internals.replicate_for_data_parallel(module)
        calls.append(replica)
        return replica

    code = sys.modules["torch.nn.parallel.replicate"]
    with pytest.MonkeyPatch.context() as patch:  # as on two devices, on the host
        patch.setattr(code, "_get_device_index", lambda device, optional: device)
        patch.setattr(
            code,
            "_broadcast_coalesced_reshape",
            lambda tensors, devices, detach=False: [
                [t * (d + 2) for t in tensors] for d in devices
            ],
        )
        internals.set_replicate_method(module, replica_of_module)
        replicas = parallel.replicate(module, [0, 1])
        assert replicas == calls
        internals.unset_replicate_method(module)
        parallel.replicate(module, [0, 1])
    assert [replica.weight.item() for replica in replicas] == [2.0, 3.0]
    assert type(replicas[0]) is Scale
    assert len(calls) == 2
    assert module.weight.item() == 1.0


# torch.fx


@probe(
    "NotAParameter",
    api="_is_param, which isinstance(x, nn.Parameter) reads,",
    purpose="trace a forward that asks whether its input is a parameter",
)
def _() -> None:
    class Stand(internals.NotAParameter, fx.Proxy):
        @property  # type: ignore[misc]
        def __class__(self) -> type:
            return torch.Tensor

    graph = fx.Graph()
    tracer = fx.Tracer()
    tracer.graph = graph
    stand = Stand(graph.placeholder("x"), tracer)
    assert isinstance(stand, torch.Tensor)
    assert isinstance(stand, nn.Parameter) is False


@probe(
    "reserve_name",
    api="fx.Graph._graph_namespace",
    purpose="give no node the name of the first argument of generated code",
)
def _() -> None:
    graph = fx.Graph()
    internals.reserve_name(graph, "self")
    assert graph.placeholder("self").name != "self"
    assert fx.Graph().placeholder("self").name == "self"


@probe(
    "wrap_functions_of",
    "tensors_of_tracer",
    "call_by_full_name",
    api="fx.Tracer._autowrap_search, fx.Tracer.tensor_attrs or node.meta['is_wrapped']",
    purpose="record PyTorch's factories, and tell the tensors of a module from others",
)
def _() -> None:
    table = torch.ones(2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("known", torch.ones(2))
            self.constant = torch.ones(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.zeros(x.shape[0]) + self.constant

    class Tracer(fx.Tracer):
        def create_arg(self, a: Any) -> Any:
            if isinstance(a, torch.Tensor):
                found.append(a in internals.tensors_of_tracer(self))
                found.append(table in internals.tensors_of_tracer(self))
            return super().create_arg(a)

    found: list[bool] = []
    model = Model()
    tracer = Tracer(autowrap_functions=(torch.zeros,))
    internals.wrap_functions_of(tracer, torch)
    graph = tracer.trace(model)
    assert found == [True, False]
    (zeros,) = (node for node in graph.nodes if node.target is torch.zeros)
    assert "is_wrapped" in zeros.meta  # without this the code below would need no change
    internals.call_by_full_name(zeros)
    code = graph.python_code("self")
    assert "torch.zeros" in code.src
    scope = dict(code.globals)
    exec(code.src, scope)
    assert scope["forward"](model, torch.ones(2)).tolist() == [2.0, 2.0]


@probe(
    "fake_tensor_mode",
    "is_data_dependent_error",
    api="torch._subclasses.fake_tensor",
    purpose="work out the shapes in a forward without computing it",
)
def _() -> None:
    weight = torch.ones(3, 5)
    with internals.fake_tensor_mode():
        x = torch.empty(2, 3, device="cuda")
        assert (x.cpu() @ weight).shape == (2, 5)
        assert x.device.type == "cuda"
        for ask in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: x.nonzero()):
            with pytest.raises(RuntimeError, match=r"scalar|nonzero") as caught:
                ask()
            assert internals.is_data_dependent_error(caught.value)
        with pytest.raises(RuntimeError, match="same reduction dim") as caught:
            x.cpu() @ x.cpu()
        assert not internals.is_data_dependent_error(caught.value)


# torch.compile


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@probe("dynamo_was_imported", api="torch._dynamo", purpose="know whether anything is compiled")
def _() -> None:
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    compiled(torch.ones(1))
    assert internals.dynamo_was_imported()
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch._dynamo")
        assert not internals.dynamo_was_imported()


@probe(
    "mark_first_size_symbolic",
    api="the attributes that torch._dynamo.maybe_mark_dynamic and mark_unbacked set on a tensor",
    purpose="compile one graph for every drop rate",
)
def _() -> None:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    def graphs(mark: Callable[[torch.Tensor], Any] | None) -> list[bool]:
        """For each graph that is compiled for 6 sizes, whether a size is without a known value."""
        torch.compiler.reset()
        unknown: list[bool] = []

        def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            values = [node.meta.get("example_value") for node in graph.graph.nodes]
            sizes = [value for value in values if isinstance(value, torch.SymInt)]
            unknown.append(any(free_unbacked_symbols(size) for size in sizes))
            return graph.forward

        share: dict[int, torch.Tensor] = {}
        function = torch.compile(
            lambda x: x * (share[0].shape[0] // 2), backend=backend, fullgraph=True
        )
        for size in (40, 30, 20, 10, 4, 3):
            share[0] = torch.empty(size, 0)
            if mark is not None:
                mark(share[0])
            assert function(torch.ones(2)).tolist() == [size // 2] * 2
        return unknown

    def known(tensor: torch.Tensor) -> None:
        internals.mark_first_size_symbolic(tensor, value_known=True, largest=64, hint=32)

    def not_known(tensor: torch.Tensor) -> None:
        internals.mark_first_size_symbolic(tensor, value_known=False, largest=64, hint=32)

    assert graphs(known) == [False]
    assert graphs(not_known) == [True]
    assert len(graphs(None)) > 1


@probe(
    "leave_frame_uncompiled",
    api="torch._C._dynamo.eval_frame.set_code_exec_strategy",
    purpose="keep torchdrop's own functions from being compiled for each block in batch mode",
)
def _() -> None:
    def calls_compiled(skip: bool) -> list[str]:
        torch.compiler.reset()
        seen: list[str] = []

        def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            seen.extend(getattr(node.target, "__name__", node.target) for node in graph.graph.nodes)
            return graph.forward

        def inner(x: torch.Tensor) -> torch.Tensor:
            return x.sin().cos()

        def outer(x: torch.Tensor) -> torch.Tensor:
            x = torch.add(x, 1)
            torch._dynamo.graph_break()
            return inner(torch.mul(x, 2))

        if skip:
            internals.leave_frame_uncompiled(outer.__code__)
        x = torch.ones(2)
        expected = outer(x)
        assert torch.equal(torch.compile(outer, backend=backend)(x), expected)
        return seen

    assert {"add", "mul", "sin", "cos"} <= set(calls_compiled(False))
    compiled = calls_compiled(True)
    assert {"sin", "cos"} <= set(compiled)
    assert not {"add", "mul"} & set(compiled)


# Counting operations


@probe(
    "count_flops_without_modules",
    api="FlopCounterMode.mod_tracker",
    purpose="count FLOPs without hooks on every module",
)
def _() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    for alone in (True, False):
        mode = FlopCounterMode(display=False)
        if alone:
            internals.count_flops_without_modules(mode)
        with mode:
            model(torch.ones(4, 3)).sum().backward()
        assert mode.get_total_flops() == 2 * (2 * 4 * 3 * 5)
        assert (set(mode.get_flop_counts()) == {"Global"}) == alone


@probe(
    "cpu_attention_operations",
    api="torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    purpose="count the FLOPs of attention on the CPU",
)
def _() -> None:
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    with Seen() as seen:
        F.scaled_dot_product_attention(x, x, x).sum().backward()
    operations = internals.cpu_attention_operations()
    assert operations is not None
    ran = [func.overloadpacket for func in seen.operations]
    assert all(operation in ran for operation in operations)


# The tests of the probes


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("found", PROBES, ids=lambda found: found.names[0])
def test_a_private_api_behaves_as_torchdrop_needs_it(found: Probe) -> None:
    check(found)


def test_every_name_has_a_probe() -> None:
    tried = [name for found in PROBES for name in found.names]
    assert sorted(tried) == sorted(internals.__all__)
    assert len(set(tried)) == len(tried)


def test_a_probe_that_fails_names_the_api_and_what_it_is_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (found,) = (found for found in PROBES if found.names == ("in_backward_pass",))
    monkeypatch.setattr(internals, "_current_graph_task_id", lambda: -1)
    with pytest.raises(
        pytest.fail.Exception, match=r"_current_graph_task_id, .* to not count what a checkpoint"
    ):
        check(found)
