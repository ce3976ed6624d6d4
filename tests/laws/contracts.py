"""What every layer has to hold, as one list of checks that a layer is run through.

A `Layer` says how to make the layer and what to feed it; each function in `CHECKS` takes one and
raises AssertionError where the layer breaks that term. test_contracts.py runs all of them,
and broken layers which show that the checks can fail.
"""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy import stats
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

ALPHA = 1e-6
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def masked(dropped: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float], float]:
    """The law of a layer that drops units independently; `dropped` finds them in the output."""

    def law(y: Tensor, p: float) -> float:
        gone = dropped(y)
        return stats.binomtest(int(gone.sum()), gone.numel(), p).pvalue

    return law


@dataclass(frozen=True)
class Layer:
    """A layer under test.

    make: the layer for a rate.
    function: the same with (x, p, training=..., generator=...), or None if there is none.
    shape: an input, the batch first.
    many: the shape of an input large enough for statistics.
    law: (output for `many` ones, p) -> how probable, under the law of p, what it shows is.
    eval_is_identity: whether evaluation returns the very object.
    identity_at_0: whether p=0 gives x.
    zero_at_1: whether p=1 sets everything to zero; else values and gradients have to be finite.
    rate: the name of the rate.
    rates: those at which the law is tested.
    ends: the rates at the ends that are legal.
    takes_integers: whether images of integers are fine.
    allocates: how many times the bytes of its input it may allocate.
    """

    name: str
    make: Callable[[float], nn.Module]
    function: Callable[..., Tensor] | None
    shape: tuple[int, ...]
    many: tuple[int, ...]
    law: Callable[[Tensor, float], float]
    eval_is_identity: bool = True
    identity_at_0: bool = True
    zero_at_1: bool = True
    rate: str = "p"
    # At .001 a mask drawn in bfloat16, which knows steps of 1/256, is far off; so is p for 1-p.
    rates: tuple[float, ...] = (0.001, 0.3, 0.9)
    ends: tuple[float, ...] = (0, 1, 0.0, 1.0)
    takes_integers: bool = False
    allocates: float = 2.0

    def input(self, dtype: torch.dtype = torch.float32, **kwargs: bool) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.shape, generator=generator).to(dtype)
        return x.requires_grad_(**kwargs) if kwargs else x


def delivers_its_rate_in_every_dtype(layer: Layer) -> None:
    for dtype in DTYPES:
        for p in layer.rates:
            torch.manual_seed(0)
            y = layer.make(p).train()(torch.ones(layer.many, dtype=dtype))
            assert layer.law(y, p) > ALPHA, (dtype, p)


def keeps_dtype_shape_and_finite_values(layer: Layer) -> None:
    for dtype in DTYPES:
        x = layer.input(dtype, requires_grad=True)
        y = layer.make(0.4).train()(x)
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert y.isfinite().all()
        assert x.grad.isfinite().all()


def evaluation_is_the_identity_by_object(layer: Layer) -> None:
    if layer.eval_is_identity:
        x = layer.input()
        for p in layer.ends:
            assert layer.make(p).eval()(x) is x
        assert layer.make(0.5).eval()(x) is x
        assert layer.make(0.0).train()(x) is x


def ends_are_finite_and_right(layer: Layer) -> None:
    for p in layer.ends:
        for dtype in DTYPES:
            x = layer.input(dtype, requires_grad=True)
            y = layer.make(p).train()(x)
            y.sum().backward()
            if layer.identity_at_0 if p == 0 else layer.zero_at_1:
                expected = torch.ones_like(x) if p == 0 else torch.zeros_like(x)
                assert torch.equal(y, x * expected)
                assert torch.equal(x.grad, expected)
            else:
                assert y.isfinite().all()
                assert x.grad.isfinite().all()


def what_is_dropped_is_gone_even_if_infinite(layer: Layer) -> None:
    if not layer.zero_at_1:
        return
    for value in (math.inf, -math.inf, math.nan):
        x = torch.full(layer.shape, value).requires_grad_()
        y = layer.make(1.0).train()(x)
        y.sum().backward()
        assert torch.equal(y, torch.zeros_like(y))
        assert x.grad.isfinite().all()


def has_a_generator(layer: Layer) -> None:
    if layer.function is None:
        return

    def seeded() -> Tensor:
        return layer.function(
            torch.ones(layer.many), 0.5, training=True, generator=torch.Generator().manual_seed(5)
        )

    before = torch.get_rng_state()
    assert torch.equal(seeded(), seeded())
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(seeded(), torch.ones(layer.many))


def follows_the_global_seed(layer: Layer) -> None:
    module, x = layer.make(0.5).train(), torch.ones(layer.many)
    torch.manual_seed(3)
    first = module(x)
    assert not torch.equal(first, module(x))
    torch.manual_seed(3)
    assert torch.equal(first, module(x))


def compiles_whole(layer: Layer) -> None:
    # The backend that runs what was captured: capture is what a layer can break.
    torch._dynamo.reset()
    module, x = layer.make(0.3).train(), torch.ones(layer.many)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    assert layer.law(compiled(x), 0.3) > ALPHA
    y = layer.input(requires_grad=True)
    compiled(y).sum().backward()
    assert y.grad.isfinite().all()
    module.eval()
    assert torch.equal(compiled(x), x) or not layer.eval_is_identity


def runs_under_vmap(layer: Layer) -> None:
    module = layer.make(0.5).train()
    x = torch.ones(20, *layer.shape)
    y = torch.func.vmap(module, randomness="different")(x)
    assert y.shape == x.shape
    assert any(not torch.equal(y[0], y[i]) for i in range(1, 20))
    shared = torch.func.vmap(lambda _: module(x[0]), randomness="different")(x)
    assert shared.shape == x.shape
    grads = torch.func.vmap(torch.func.grad(lambda t: module(t).sum()), randomness="different")(x)
    assert grads.isfinite().all()


def replays_in_a_checkpoint(layer: Layer) -> None:
    module = layer.make(0.5).train()
    grads = []
    for run in (
        module,
        lambda x: checkpoint(module, x, use_reentrant=False),
        lambda x: checkpoint(module, x, use_reentrant=True),
    ):
        x = torch.ones(layer.many, requires_grad=True)
        torch.manual_seed(0)
        y = run(x)
        torch.manual_seed(99)  # what comes between must not matter
        y.square().sum().backward()
        grads.append(x.grad)
    assert not torch.equal(grads[0], 2 * torch.ones(layer.many))
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def is_a_leaf_for_fx_that_honours_eval(layer: Layer) -> None:
    parent = nn.Sequential(nn.Identity(), layer.make(0.5)).train()
    traced = fx.symbolic_trace(parent)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1"]
    x = torch.ones(layer.many)
    assert not torch.equal(traced.train()(x), x)
    if layer.eval_is_identity:
        assert torch.equal(traced.eval()(x), x)


def works_on_the_meta_device(layer: Layer) -> None:
    with torch.device("meta"):
        module = layer.make(0.5).train()
        y = module(torch.empty(layer.shape, requires_grad=True))
    assert y.is_meta
    y.sum().backward()
    # Made on meta, used on a real device: nothing of the layer may have stayed behind.
    assert module(layer.input()).shape == layer.shape


def pickles_and_copies(layer: Layer) -> None:
    module, x = layer.make(0.5).train(), torch.ones(layer.many)
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        torch.manual_seed(0)
        expected = module(x)
        torch.manual_seed(0)
        assert torch.equal(twin(x), expected)
        assert repr(twin) == repr(module)
        assert list(twin.state_dict()) == list(module.state_dict())


def keeps_channels_last(layer: Layer) -> None:
    for size, memory_format in (
        ((4, 8, 5, 6), torch.channels_last),
        ((4, 8, 3, 5, 6), torch.channels_last_3d),
    ):
        if len(size) != len(layer.shape):
            continue
        for shape in (size, (2, 64, *(32 for _ in size[2:]))):
            x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
            y = layer.make(0.5).train()(x)
            assert y.is_contiguous(memory_format=memory_format)
            y.backward(torch.ones_like(y))
            assert x.grad.is_contiguous(memory_format=memory_format)


def peak_of_bytes(f: Callable[[], object]) -> int:
    """The most that is allocated at a time while `f` runs, on top of what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = f()
    del result
    events = seen.profiler.kineto_results.events()
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def allocates_its_output_and_one_mask(layer: Layer) -> None:
    sizes = {3: (8, 96, 300), 4: (8, 64, 20, 20), 5: (8, 32, 8, 10, 10)}
    module, x = layer.make(0.3).train(), torch.ones(sizes[len(layer.shape)], requires_grad=True)
    module(x)
    # A few kilobytes for what is drawn for samples or channels.
    assert peak_of_bytes(lambda: module(x)) <= layer.allocates * x.nbytes + 2**16


def takes_an_empty_batch(layer: Layer) -> None:
    x = torch.empty(0, *layer.shape[1:], requires_grad=True)
    for p in (0.5, *layer.ends):
        y = layer.make(p).train()(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape


def refuses_bad_rates(layer: Layer) -> None:
    legal = rf"{layer.rate} has to be (between 0 and 1|below 1)"
    beyond = (-0.1, 1.5, math.nan, math.inf, *({1} - set(layer.ends)))
    for p in beyond:
        with pytest.raises(ValueError, match=rf"{legal}.*, but got"):
            layer.make(p)
        module = layer.make(0.5)
        with pytest.raises(ValueError, match=rf"{legal}.*, but got"):
            setattr(module, layer.rate, p)
        assert getattr(module, layer.rate) == 0.5
    for p in (True, False, "0.5", None, torch.tensor(0.5)):
        with pytest.raises(TypeError, match=r"has to be a real number between 0 and 1, but got"):
            layer.make(p)
        if layer.function is not None:
            with pytest.raises(TypeError, match=r"has to be a real number"):
                layer.function(layer.input(), p)


def refuses_bad_inputs(layer: Layer) -> None:
    for module in (layer.make(0.5).train(), layer.make(0.5).eval(), layer.make(0.0)):
        with pytest.raises(ValueError, match=r"has to have .* dimensions?.*, but got (a )?0"):
            module(torch.tensor(1.0))
        for dtype in () if layer.takes_integers else (torch.int64, torch.bool):
            with pytest.raises(TypeError, match=r"floating-point tensor, but got dtype torch\."):
                module(torch.ones(layer.shape, dtype=dtype))
        with pytest.raises(TypeError, match=r"has to be a .*, but got list"):
            module([1.0])


def can_change_its_rate(layer: Layer) -> None:
    module, x = layer.make(0.0).train(), torch.ones(layer.many)
    assert module(x) is x or not layer.eval_is_identity
    most = max(layer.ends) or 0.9
    setattr(module, layer.rate, most)
    assert not module(x).any() if layer.zero_at_1 else not torch.equal(module(x), x)
    assert f"{layer.rate}={float(most)}" in repr(module)


def compiles_a_bounded_number_of_times_while_its_rate_changes(layer: Layer) -> None:
    torch._dynamo.reset()
    compiled = 0

    def backend(graph: fx.GraphModule, _: object) -> Callable[..., object]:
        nonlocal compiled
        compiled += 1
        return graph.forward

    module = nn.Sequential(nn.Linear(layer.shape[-1], layer.shape[-1]), layer.make(0.0)).train()
    step = torch.compile(module, backend=backend, fullgraph=True)
    for i in range(30):
        setattr(module[1], layer.rate, 0.02 * i)
        step(layer.input()).sum().backward()
    assert compiled <= 3


CHECKS = (
    delivers_its_rate_in_every_dtype,
    keeps_dtype_shape_and_finite_values,
    evaluation_is_the_identity_by_object,
    ends_are_finite_and_right,
    what_is_dropped_is_gone_even_if_infinite,
    has_a_generator,
    follows_the_global_seed,
    compiles_whole,
    runs_under_vmap,
    replays_in_a_checkpoint,
    is_a_leaf_for_fx_that_honours_eval,
    works_on_the_meta_device,
    pickles_and_copies,
    keeps_channels_last,
    allocates_its_output_and_one_mask,
    takes_an_empty_batch,
    refuses_bad_rates,
    refuses_bad_inputs,
    can_change_its_rate,
    compiles_a_bounded_number_of_times_while_its_rate_changes,
)
