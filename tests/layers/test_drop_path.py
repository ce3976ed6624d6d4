"""What drops whole slices, drop_path, drop_path_add, spatial_dropout: laws, rates, messages."""

import math

import pytest
import torch
from contracts import Layer, masked
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from torchdrop.functional import drop_path, drop_path_add
from torchdrop.layers import DropPath
from torchdrop.layers import drop_path as module

ALPHA = 1e-6
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
RATES = [0.1, 0.3, 0.9]


@pytest.fixture(params=["runs", "composed"])
def either_way(request, monkeypatch):
    """Both ways of computing: one kernel a run of rows, and kernels over everything."""
    least = 1 if request.param == "runs" else 10**12
    monkeypatch.setattr(module, "_MIN_ROW_SIZE_FOR_RUNS", least)
    return request.param


def seeded(f, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return f(*args, **kwargs)


def rows_kept(y):
    return (y != 0).flatten(1).any(1)


# Laws


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    p=st.floats(0.01, 0.99),
    mode=st.sampled_from(["row", "batch"]),
    data=st.data(),
)
def test_output_is_0_or_x_over_keep_in_whole_samples(shape, p, mode, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = torch.rand(shape, dtype=torch.float64) + 1
    y = drop_path(x, p, mode=mode, batch_dim=dim)
    kept = y != 0
    assert torch.equal(y[kept], x[kept] / (1 - p))
    samples = kept.movedim(dim, 0).reshape(shape[dim] if mode == "row" else 1, -1)
    assert torch.equal(samples.all(1), samples.any(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", RATES)
@pytest.mark.usefixtures("either_way")
def test_kept_value_is_correctly_rounded(dtype, p):
    x = torch.randn(64, 40).to(dtype)
    y = drop_path(x, p)
    kept = rows_kept(y)
    assert 0 < kept.sum() < 64
    exact = x[kept].double() / (1 - p)
    if dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(y[kept], exact.to(dtype))
    else:  # 1 - p is itself rounded to the dtype
        assert torch.allclose(y[kept].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_rounding_law_can_fail():
    """Scaling the mask instead, as the peers do: every kept value off by .16 % in bfloat16."""
    x = torch.randn(100).bfloat16()
    mask = torch.ones(100, dtype=torch.bfloat16).div_(0.9)
    assert not torch.equal(x * mask, (x.double() / 0.9).bfloat16())


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.usefixtures("either_way")
def test_evaluation_and_p_0_return_the_object(mode):
    x = torch.randn(3, 4)
    for inplace in (False, True):
        assert drop_path(x, 0.5, False, mode=mode, inplace=inplace) is x
        assert drop_path(x, 0.0, mode=mode, inplace=inplace) is x
        assert drop_path(x, 1, False, mode=mode, inplace=inplace) is x


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.usefixtures("either_way")
def test_what_is_dropped_is_exactly_zero_forward_and_backward(value, mode):
    skip = torch.randn(6, 3)
    x = torch.full((6, 3), value, requires_grad=True)
    y = drop_path(x, 1.0, mode=mode)
    z = drop_path_add(skip, x, 1.0, mode=mode)
    (y.sum() + z.sum()).backward()
    assert torch.equal(y, torch.zeros(6, 3))
    assert not y.signbit().any()
    assert torch.equal(z, skip)
    assert torch.equal(x.grad, torch.zeros(6, 3))


@pytest.mark.usefixtures("either_way")
def test_gradient_follows_the_forward():
    x = torch.randn(32, 5, requires_grad=True)
    y = drop_path(x, 0.4)
    g = torch.randn(32, 5)
    y.backward(g)
    assert torch.equal(x.grad, torch.where(rows_kept(y)[:, None], g / 0.6, 0.0))


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch, in forward mode
@pytest.mark.usefixtures("either_way")
def test_derivatives_of_every_kind(mode):
    skip = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    # Cubed, so that the second derivative is not zero.
    masked = [lambda t: seeded(drop_path, t, 0.4, mode=mode, seed=2).pow(3), (x,)]
    added = [
        lambda s, t: seeded(drop_path_add, s, t, 0.4, mode=mode, seed=2).pow(3),
        (skip, x),
    ]
    for f, inputs in (masked, added):
        assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, inputs, check_fwd_over_rev=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.usefixtures("either_way")
def test_forward_mode_with_one_tangent():
    skip, x, tangent = torch.randn(3, 6, 4).unbind()
    with dual_level():
        out = seeded(drop_path_add, skip, make_dual(x, tangent), 0.5)
        got = unpack_dual(out).tangent
    assert torch.equal(got, seeded(drop_path, tangent, 0.5))


def test_both_ways_give_the_same_bits(monkeypatch):
    x = torch.randn(33, 7, 11)
    for dtype in DTYPES:
        for mode in ("row", "batch"):
            for batch_dim in (0, 1, 2):
                kwargs = {"mode": mode, "batch_dim": batch_dim}
                results = []
                for least in (1, 10**12):
                    monkeypatch.setattr(module, "_MIN_ROW_SIZE_FOR_RUNS", least)
                    results.append(seeded(drop_path, x.to(dtype), 0.4, **kwargs))
                assert torch.equal(*results)


# drop_path_add


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", RATES)
@pytest.mark.usefixtures("either_way")
def test_drop_path_add_is_the_sum(dtype, p):
    skip, x = torch.randn(2, 64, 40).to(dtype)
    got = seeded(drop_path_add, skip, x, p)
    branch = seeded(drop_path, x, p)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert ((got - (skip + branch)).abs() <= eps * (skip.abs() + branch.abs())).all()
    gone = ~rows_kept(branch)
    assert torch.equal(got[gone], skip[gone])


@pytest.mark.usefixtures("either_way")
def test_drop_path_add_without_dropping_is_the_plain_sum():
    skip, x = torch.randn(2, 8, 40)
    assert torch.equal(drop_path_add(skip, x, 0.5, False), skip + x)
    assert torch.equal(drop_path_add(skip, x, 0.0), skip + x)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.usefixtures("either_way")
def test_drop_path_add_never_gives_away_the_memory_of_skip(mode):
    skip = torch.randn(8, 40)
    before = skip.clone()
    for p in (0.0, 0.5, 1.0):
        drop_path_add(skip, torch.randn(8, 40), p, mode=mode).zero_()
    assert torch.equal(skip, before)


def test_drop_path_add_promotes_as_a_sum_does():
    skip, x = torch.randn(2, 8, 40)
    assert drop_path_add(skip, x.bfloat16(), 0.5).dtype == torch.float32
    assert drop_path_add(skip.bfloat16(), x, 0.5).dtype == torch.float32


@pytest.mark.usefixtures("either_way")
def test_drop_path_add_under_compile_and_vmap():
    skip, x = torch.randn(2, 8, 40)
    compiled = torch.compile(drop_path_add, fullgraph=True, backend="aot_eager")
    expected = seeded(drop_path_add, skip, x, 0.5)
    assert torch.allclose(seeded(compiled, skip, x, 0.5), expected)
    mapped = torch.func.vmap(lambda s, t: drop_path_add(s, t, 0.5), randomness="different")
    assert mapped(torch.stack([skip, skip]), torch.stack([x, x])).shape == (2, 8, 40)


@pytest.mark.usefixtures("either_way")
def test_drop_path_add_keeps_channels_last():
    skip, x = torch.randn(2, 4, 8, 5, 5)
    skip, x = (t.to(memory_format=torch.channels_last) for t in (skip, x))
    got = seeded(drop_path_add, skip, x, 0.5)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, seeded(drop_path_add, skip.contiguous(), x.contiguous(), 0.5))
    mixed = seeded(drop_path_add, skip, x.contiguous(), 0.5)
    assert torch.allclose(mixed, got)


# In place

AFTER = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: torch.softmax(z, 1),
    "exp": torch.exp,
    "view of relu": lambda z: torch.relu(z).view(2, 4, 5),
    "transposed relu": lambda z: torch.relu(z).t(),
    "clamp": lambda z: z.clamp(-0.5, 0.5),
    "linear": lambda z: z @ torch.eye(5),
    "gelu": torch.nn.functional.gelu,
    "layer_norm": lambda z: torch.nn.functional.layer_norm(z, (5,)),
    "view of product": lambda z: (z * 2).view(2, 4, 5),
    "leaf": lambda z: z,
}


@pytest.mark.parametrize("end", AFTER)
@pytest.mark.usefixtures("either_way")
def test_inplace_is_right_whatever_the_branch_ends_in(end):
    z = torch.randn(8, 5, requires_grad=True)
    results = []
    for inplace in (True, False):
        y = seeded(drop_path, AFTER[end](z), 0.5, inplace=inplace)
        results.append((y, *torch.autograd.grad(y.square().sum(), z)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("either_way")
def test_inplace_writes_into_its_input_where_autograd_allows():
    z = torch.randn(8, 5, requires_grad=True)
    for end in ("linear", "gelu", "layer_norm"):
        x = AFTER[end](z)
        y = drop_path(x, 0.5, inplace=True)
        assert y.data_ptr() == x.data_ptr()
        assert torch.equal(x, y)
    x = torch.randn(8, 5)
    assert drop_path(x, 0.5, inplace=True).data_ptr() == x.data_ptr()
    x = torch.relu(z)
    before = x.detach().clone()
    assert drop_path(x, 0.5, inplace=True).data_ptr() != x.data_ptr()
    assert torch.equal(x, before)


def test_inplace_has_nothing_to_hide():
    """Why: the same thing done without a look at what autograd saved."""
    x = torch.relu(torch.randn(8, 5, requires_grad=True))
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


# Statistics


def rate_is_right(op, p, dtype, mode="row"):
    torch.manual_seed(0)
    if mode == "batch":
        ones = torch.ones(1, 1, dtype=dtype)
        gone, draws = sum(float(op(ones, p, mode=mode)) == 0 for _ in range(5000)), 5000
    else:
        y = op(torch.ones(10**6, 1, dtype=dtype), p)
        gone, draws = int((y == 0).sum()), y.numel()
    return stats.binomtest(gone, draws, p).pvalue > ALPHA


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.001, *RATES])
def test_rate(p, dtype):
    assert rate_is_right(drop_path, p, dtype)


def test_rate_of_batch_mode():
    assert rate_is_right(drop_path, 0.3, torch.float32, "batch")


def test_rate_can_fail():
    def keeps_p(x, p, **kwargs):
        return drop_path(x, 1 - p, **kwargs)

    def rounded(x, p):
        return x * torch.floor(torch.rand(x.shape, dtype=x.dtype) + (1 - p))

    assert not rate_is_right(keeps_p, 0.3, torch.float32)
    assert not rate_is_right(keeps_p, 0.3, torch.float32, "batch")
    assert not rate_is_right(rounded, 0.001, torch.bfloat16)


def mean_is_kept(op):
    torch.manual_seed(0)
    p, n = 0.3, 10**6
    error = float(op(torch.ones(n, 1), p).double().mean()) - 1
    return abs(error) < 5 * math.sqrt(p / (1 - p) / n)


def test_mean():
    assert mean_is_kept(drop_path)
    assert mean_is_kept(lambda x, p: drop_path_add(-x, x, p) + 1)


def test_mean_can_fail():
    assert not mean_is_kept(lambda x, p: drop_path(x, p) * (1 - p))


def rows_are_independent(op):
    """Neighbours are dropped together with probability p * p."""
    torch.manual_seed(0)
    gone = op(torch.ones(10**6, 1), 0.3).flatten() == 0
    both = int((gone[::2] & gone[1::2]).sum())
    return stats.binomtest(both, len(gone) // 2, 0.09).pvalue > ALPHA


def test_rows_are_independent():
    assert rows_are_independent(drop_path)


def test_independence_can_fail():
    assert not rows_are_independent(
        lambda x, p: drop_path(x[::2], p).repeat_interleave(2, dim=0)  # two neighbours, one draw
    )


# Examples and messages


def test_batch_dim_counts_samples():
    x = torch.ones(7, 50, 3)  # (tokens, batch, features)
    y = drop_path(x, 0.5, batch_dim=1)
    per_sample = y.transpose(0, 1).flatten(1)
    assert set(per_sample.sum(1).tolist()) == {0.0, 42.0}
    assert torch.equal(
        seeded(drop_path, x, 0.5, batch_dim=-2), seeded(drop_path, x, 0.5, batch_dim=1)
    )


def test_the_shape_is_never_broadcast():
    """A mask of a fixed rank 4 makes (4, 1, 4, 3) of a (4, 3) input."""
    assert drop_path(torch.ones(4, 3), 0.5).shape == (4, 3)
    assert drop_path(torch.ones(4), 0.5).shape == (4,)


def test_fx_records_one_node_a_call():
    class Block(torch.nn.Module):
        def forward(self, x):
            return drop_path_add(x, drop_path(x * 2, 0.5), 1.0)

    graph = torch.fx.symbolic_trace(Block()).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"][1:] == [
        drop_path,
        drop_path_add,
    ]


def test_a_parameter_and_an_expanded_tensor():
    assert drop_path(torch.nn.Parameter(torch.ones(4, 5000)), 1.0).sum() == 0
    x = torch.ones(1, 5000).expand(64, 5000)
    y = drop_path(x, 0.5)
    assert 0 < rows_kept(y).sum() < 64
    assert torch.equal(x, torch.ones(64, 5000))


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_refuses_a_rate_out_of_range(p):
    x = torch.ones(2, 2)
    for call in (lambda: drop_path(x, p), lambda: drop_path_add(x, x, p, False)):
        with pytest.raises(
            ValueError, match=r"drop probability p has to be between 0 and 1, but got"
        ):
            call()


@pytest.mark.parametrize("p", [True, "0.1", None, torch.tensor(0.1)])
def test_refuses_what_is_no_rate(p):
    with pytest.raises(TypeError, match=r"p has to be a real number between 0 and 1, but got"):
        drop_path(torch.ones(2, 2), p)


def test_refuses_other_bad_arguments():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"mode has to be either 'batch' or 'row', but got 'col'"):
        drop_path(x, 0.1, mode="col")
    with pytest.raises(ValueError, match=r"batch_dim has to be between -2 and 1 for .* 2 dim.* 2"):
        drop_path(x, 0.1, batch_dim=2)
    with pytest.raises(TypeError, match=r"batch_dim has to be an integer, but got True"):
        drop_path(x, 0.1, batch_dim=True)
    with pytest.raises(ValueError, match=r"input has to have at least one dimension.* 0-d tensor"):
        drop_path(torch.tensor(1.0), 0.1)
    with pytest.raises(TypeError, match=r"floating-point tensor, but got dtype torch\.int64"):
        drop_path(torch.ones(2, dtype=torch.int64), 0.1)
    with pytest.raises(TypeError, match=r"input has to be a tensor, but got float"):
        drop_path(1.0, 0.1)
    with pytest.raises(TypeError, match=r"branch has to be a floating-point tensor"):
        drop_path_add(x, x.int(), 0.1)
    with pytest.raises(ValueError, match=r"skip has to have at least one dimension"):
        drop_path_add(torch.tensor(1.0), x, 0.1)
    with pytest.raises(ValueError, match=r"same shape, but got \(2, 3\) and \(1, 3\)"):
        drop_path_add(x, x[:1], 0.1)


def test_drop_path_forwards_its_arguments():
    x = torch.randn(5, 7)
    torch.manual_seed(0)
    expected = drop_path(x, 0.5, mode="row", batch_dim=1)
    torch.manual_seed(0)
    assert torch.equal(DropPath(0.5, batch_dim=1)(x), expected)
    y = DropPath(0.5, inplace=True)(x)
    assert y.data_ptr() == x.data_ptr()
    assert set(DropPath(0.5, mode="batch")(torch.ones(9, 9)).unique().tolist()) <= {0.0, 2.0}


def test_repr():
    assert repr(DropPath(0.1)) == "DropPath(p=0.1, mode='row')"
    assert repr(DropPath(1, "batch", 1, True)) == (
        "DropPath(p=1.0, mode='batch', batch_dim=1, inplace=True)"
    )


# What every layer has to fulfil (tests/laws/contracts.py runs this list)


def rows_gone(y):
    return (y == 0).flatten(1).all(1)


def contract(name, shape):
    return Layer(
        name=name,
        make=DropPath,
        function=drop_path,
        shape=shape,
        many=(250_000, 1),
        law=masked(rows_gone),
    )


CONTRACTS = [
    contract("DropPath", (6, 4, 3)),
    contract("DropPath 4-d", (4, 8, 5, 6)),
    contract("DropPath 5-d", (4, 8, 3, 5, 6)),
]
