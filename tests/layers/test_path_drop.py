"""path_drop and PathDrop: the law of a join, columns, modules that do not run, a FractalNet."""

import math

import pytest
import torch
from contracts import Layer
from scipy import stats
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from torchdrop.functional import path_drop, path_drop_column
from torchdrop.layers import PathDrop

ALPHA = 1e-6
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def seeded(f, *args, **kwargs):
    torch.manual_seed(0)
    return f(*args, **kwargs)


def which(op, n, samples=20_000, **kwargs):
    """(samples, n): which of n inputs each sample kept, read off the gradients."""
    xs = [torch.ones(samples, 1, dtype=torch.float64, requires_grad=True) for _ in range(n)]
    seeded(op, xs, **kwargs).sum().backward()
    return torch.cat([x.grad for x in xs], 1) != 0


# Laws


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_is_the_mean_of_the_inputs_kept(n, mode):
    xs = torch.randn(n, 30, 4, dtype=torch.float64, requires_grad=True)
    y = path_drop(xs.unbind(), 0.5, mode=mode)
    (grad,) = torch.autograd.grad(y.sum(), xs)
    kept = (grad != 0).all(2)
    assert torch.equal(kept, (grad != 0).any(2))
    assert kept.any(0).all()
    expected = (xs * kept[..., None]).sum(0) / kept.sum(0)[:, None]
    assert torch.allclose(y, expected, rtol=1e-14)
    assert torch.allclose(grad, (kept / kept.sum(0)).double()[..., None].expand_as(grad))
    if mode == "batch":
        assert torch.equal(kept, kept[:, :1].expand_as(kept))


def test_evaluation_and_p_0_are_the_mean_of_all():
    xs = torch.randn(3, 5, 4, dtype=torch.float64).unbind()
    expected = sum(xs) / 3
    assert torch.allclose(path_drop(xs, 0.5, False), expected, rtol=1e-14)
    assert torch.allclose(path_drop(xs, 0), expected, rtol=1e-14)
    assert path_drop(xs[:1], 0.5, False) is xs[0]


def test_p_1_keeps_exactly_one():
    kept = which(lambda xs: path_drop(xs, 1), 4)
    assert (kept.sum(1) == 1).all()
    assert stats.chisquare(kept.sum(0).numpy()).pvalue > ALPHA
    x = torch.randn(5, 3)
    assert torch.equal(path_drop((x,), 1), x)  # one input has nothing to be dropped for


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_dropped_is_gone_even_if_infinite(value):
    bad = torch.full((5, 3), value, requires_grad=True)
    x = torch.randn(5, 3)
    y = path_drop((bad, x), 0.5, column=torch.tensor([1]))
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(bad.grad, torch.zeros(5, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch, in forward mode
def test_derivatives():
    xs = tuple(torch.randn(4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def f(*xs):
        return seeded(path_drop, xs, 0.5).pow(3)

    assert gradcheck(f, xs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, xs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_rounded_once(dtype):
    xs = torch.randn(7, 200, 3).to(dtype)
    y = seeded(path_drop, xs.unbind(), 0.3)
    assert y.dtype == dtype
    exact = seeded(path_drop, xs.double().unbind(), 0.3)
    if dtype in (torch.float16, torch.bfloat16):
        assert float((y != exact.to(dtype)).float().mean()) < 0.001  # ties of float32 sums
    assert torch.allclose(y.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


def test_dtypes_promote_as_a_sum():
    x = torch.ones(3, 2)
    assert path_drop((x.bfloat16(), x), 0.5).dtype == torch.float32
    assert path_drop((x.bfloat16(), x), 0.5, False).dtype == torch.float32
    assert path_drop((x.half(), x.half()), 0.5).dtype == torch.float16


# Rates


def rate_is_right(op, p, n):
    """Each input is dropped with p - p**n / n, and pairs as the law of a join has it."""
    kept = which(lambda xs: op(xs, p), n)
    samples = len(kept)
    # All dropped: another one is chosen with probability (n - 2) / n for a pair.
    pair = p**2 - p**n * 2 / n
    checks = [(int((~kept[:, i]).sum()), p - p**n / n) for i in range(n)]
    if n > 1:
        checks.append((int((~kept[:, 0] & ~kept[:, 1]).sum()), pair))
    return all(stats.binomtest(c, samples, q).pvalue > ALPHA for c, q in checks)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("p", [0.15, 0.5, 0.9])
def test_rate(p, n):
    assert rate_is_right(path_drop, p, n)


def test_rate_can_fail():
    """Keeping the first one where all are dropped, all of them, or drawing p - p**n / n off."""

    def first(xs, p):
        gone = torch.rand(len(xs), len(xs[0]), 1) < p
        gone[0] &= ~gone.all(0)
        return sum(x * ~g for x, g in zip(xs, gone, strict=True))

    def all_of_them(xs, p):
        gone = torch.rand(len(xs), len(xs[0]), 1) < p
        gone &= ~gone.all(0)
        return sum(x * ~g for x, g in zip(xs, gone, strict=True))

    assert not rate_is_right(first, 0.5, 3)
    assert not rate_is_right(all_of_them, 0.5, 3)
    assert not rate_is_right(lambda xs, p: path_drop(xs, 1 - p), 0.15, 3)


def test_rate_of_batch_mode():
    gone = 0
    for seed in range(1500):
        torch.manual_seed(seed)
        a, b = torch.tensor([[1.0]]), torch.tensor([[3.0]])
        gone += float(path_drop((a, b), 0.4, mode="batch")) == 3
    assert stats.binomtest(gone, 1500, 0.4 - 0.4**2 / 2).pvalue > ALPHA


# Columns


def test_the_column_of_a_network():
    torch.manual_seed(0)
    column = path_drop_column(4, 20_000, "global")
    assert stats.chisquare(torch.bincount(column, minlength=4).numpy()).pvalue > ALPHA
    mixed = path_drop_column(4, 20_000)
    assert stats.binomtest(int((mixed == -1).sum()), 20_000, 0.5).pvalue > ALPHA
    assert stats.chisquare(torch.bincount(mixed[mixed >= 0], minlength=4).numpy()).pvalue > ALPHA
    assert (path_drop_column(4, 7, "local") == -1).all()
    assert path_drop_column(4, 7, "global", mode="batch").shape == (1,)
    a, b = (path_drop_column(4, 50, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)


def test_a_column_keeps_its_input_and_no_other():
    xs = torch.randn(3, 6, 2).unbind()
    column = torch.tensor([0, 1, 2, 2, 1, 0])
    y = path_drop(xs, 0.5, column=column)
    assert torch.equal(y, torch.stack(xs)[column, torch.arange(6)])
    # Inputs of columns 1 and 3: column 1 is the first, 0 and 2 do not pass.
    y = path_drop(xs[:2], 0.5, column=torch.tensor([1, 3, 0, 2, 1, 3]), columns=(1, 3))
    mean = (xs[0] + xs[1]) / 2
    for i, expected in enumerate((xs[0], xs[1], mean, mean, xs[0], xs[1])):
        assert torch.equal(y[i], expected[i])
    assert path_drop(xs, 0.0, column=torch.tensor([2])).equal(xs[2])
    assert torch.allclose(path_drop(xs, 0.5, False, column=column), sum(xs) / 3)


def test_minus_one_leaves_the_join_to_itself():
    kept = which(lambda xs: path_drop(xs, 0.5, column=torch.full((20_000,), -1)), 3)
    gone = int((~kept[:, 0]).sum())
    assert stats.binomtest(gone, 20_000, 0.5 - 0.5**3 / 3).pvalue > ALPHA
    kept = which(lambda xs: path_drop(xs, 0.0, column=torch.full((20_000,), -1)), 3)
    assert kept.all()


# Modules


class Counted(nn.Module):
    """A linear layer, and the rows that it ran on."""

    def __init__(self, features=4):
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.rows = 0

    def forward(self, x):
        self.rows += len(x)
        return self.linear(x)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_dropped_module_does_not_run(mode):
    branches = [Counted() for _ in range(3)]
    join = PathDrop(0.6, branches, mode)
    x = torch.randn(40, 4)
    ran = 0
    for _ in range(20):
        for b in branches:
            b.rows = 0
        join(x)
        seen = [b.rows for b in branches]
        assert sum(seen) >= 40
        if mode == "batch":
            assert set(seen) <= {0, 40}
        ran += sum(seen)
    # The rate of three inputs, p - p**3 / 3, within five standard deviations.
    share = 1 - (0.6 - 0.6**3 / 3)
    draws = 20 * 3 * (40 if mode == "row" else 1)
    assert abs(ran / (20 * 3 * 40) - share) < 5 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("columns", [None, (2, 0, 1)])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_modules_give_what_the_join_of_their_outputs_gives(mode, columns):
    """The reference: the same draws as a mask over outputs computed in full."""
    branches = [Counted().double() for _ in range(3)]
    join = PathDrop(0.5, branches, mode, columns=columns)
    for seed in range(6):
        column = None if seed % 2 else path_drop_column(3, 9, mode=mode)
        results = []
        for of_modules in (True, False):
            x = torch.linspace(-1, 1, 36, dtype=torch.float64).view(9, 4).requires_grad_()
            join.zero_grad()
            torch.manual_seed(seed)
            if of_modules:
                y = join(x, column=column)
            else:
                outputs = [b(x) for b in branches]
                y = path_drop(outputs, 0.5, mode=mode, column=column, columns=columns)
            y.square().sum().backward()
            grads = [p.grad.clone() for p in join.parameters()]
            results.append((y, x.grad, *grads))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_parameters_of_modules_that_did_not_run_get_zeros():
    join = PathDrop(0.5, [Counted(), Counted()])
    join(torch.randn(3, 4), column=torch.tensor([1])).sum().backward()
    first, second = join.branches
    assert torch.equal(first.linear.weight.grad, torch.zeros(4, 4))
    assert second.linear.weight.grad.any()


def test_modules_in_evaluation_in_a_checkpoint_and_on_an_empty_batch():
    join = PathDrop(0.5, [nn.Linear(4, 4), nn.Linear(4, 4)])
    x = torch.randn(6, 4, requires_grad=True)
    grads = []
    for run in (join, lambda x: checkpoint(join, x, use_reentrant=False)):
        torch.manual_seed(0)
        y = run(x)
        torch.manual_seed(9)
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*grads)
    assert join(x[:0]).shape == (0, 4)
    join.eval()
    a, b = join.branches
    assert torch.allclose(join(x), (a(x) + b(x)) / 2)


def test_modules_may_change_the_shape_and_keep_channels_last():
    join = PathDrop(0.5, [nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 8, 1, 2)])
    x = torch.randn(16, 3, 8, 8).to(memory_format=torch.channels_last)
    y = join(x)
    assert y.shape == (16, 8, 4, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)
    other = PathDrop(0.5, [nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1)])
    with pytest.raises(
        ValueError, match=r"tensors of one shape, but Conv2d returned \(.*\), where"
    ):
        other(x, column=torch.arange(16) % 2)


# A FractalNet


class FractalBlock(nn.Module):
    """Column c of `columns` is a chain of 2**c convolutions; joins where several of them end."""

    def __init__(self, columns, channels, p):
        super().__init__()
        self.columns = columns
        self.convs = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())
                for _ in range(2**c)
            )
            for c in range(columns)
        )
        self.ends = []  # for each place: the columns whose convolution ends there
        places = 2 ** (columns - 1)
        for place in range(1, places + 1):
            self.ends.append([c for c in range(columns) if place % (places >> c) == 0])
        self.joins = nn.ModuleList(PathDrop(p, columns=ends) for ends in self.ends)

    def forward(self, x, column):
        states = [x] * self.columns
        done = [0] * self.columns
        for ends, join in zip(self.ends, self.joins, strict=True):
            outputs = []
            for c in ends:
                outputs.append(self.convs[c][done[c]](states[c]))
                done[c] += 1
            x = join(*outputs, column=column)
            for c in ends:
                states[c] = x
        return x


class FractalNet(nn.Module):
    def __init__(self, columns=3, blocks=2, channels=8, classes=4, p=0.15, paths="mixed"):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(FractalBlock(columns, channels, p) for _ in range(blocks))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(4 * channels, classes)
        self.columns, self.paths = columns, paths

    def forward(self, x, column=None):
        if self.training and column is None:
            column = path_drop_column(self.columns, len(x), self.paths, device=x.device)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, column)
        return self.head(self.pool(x))

    def one_column(self, x, c):
        """The network that column c alone is."""
        x = self.stem(x)
        for block in self.blocks:
            for conv in block.convs[c]:
                x = conv(x)
        return self.head(self.pool(x))


def test_a_fractal_net_on_a_global_path_is_its_column():
    net = FractalNet(paths="global").double()
    x = torch.randn(9, 1, 6, 6, dtype=torch.float64)
    column = torch.arange(9) % 3
    y = net(x, column)
    for c in range(3):
        assert torch.allclose(y[column == c], net.one_column(x, c)[column == c], rtol=1e-12)
    net(x, torch.tensor([1])).sum().backward()
    for block in net.blocks:
        used = [any(p.grad.any() for p in convs.parameters()) for convs in block.convs]
        assert used == [False, True, False]


def test_a_global_path_needs_one_draw_for_the_network():
    """Joins that draw by themselves do not follow one column."""
    net = FractalNet(paths="local").double()
    x = torch.randn(9, 1, 6, 6, dtype=torch.float64)
    y = net(x)
    assert not any(torch.allclose(y[i], net.one_column(x, c)[i]) for i in range(9) for c in (1, 2))


def test_a_fractal_net_learns_and_every_column_is_a_network():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(n_class=4, return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    torch.manual_seed(0)
    net = FractalNet(blocks=1, channels=16)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(120):
        rows = torch.randint(500, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), labels[rows]).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        whole = float((net(x[500:]).argmax(1) == labels[500:]).float().mean())
        columns = [
            float((net.one_column(x[500:], c).argmax(1) == labels[500:]).float().mean())
            for c in range(3)
        ]
    assert whole > 0.8
    assert min(columns) > 0.6  # the paper: any column can be taken out and used


# Messages


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda x: path_drop((), 0.5),
            ValueError,
            r"a join needs at least one input, but got none",
        ),
        (lambda x: path_drop((x, x[:1]), 0.5), ValueError, r"same shape, but got \(2, 3\), \(1, 3"),
        (lambda x: path_drop((x, 3), 0.5), TypeError, r"branches\[1\] has to be a tensor, but got"),
        (lambda x: path_drop((x, x), 0.5, columns=(1,)), ValueError, r"the 2 inputs, but got \(1,"),
        (
            lambda x: path_drop((x, x), 0.5, column=torch.zeros(3).long()),
            ValueError,
            r"shape \(1,\) or \(2,\), as path_drop_column returns it, but got \(3,\)",
        ),
        (lambda x: PathDrop(0.5, [abs]), TypeError, r"branches have to be nn\.Modules, but got"),
        (lambda x: PathDrop(0.5, []), ValueError, r"a join needs at least one branch, but got"),
        (lambda x: PathDrop(0.5, [nn.Identity()], columns=(1, 2)), ValueError, r"the 1 inputs"),
        (lambda x: PathDrop(0.5, [nn.ReLU()])(x, x), TypeError, r"takes one tensor, but got 2"),
        (
            lambda x: PathDrop(0.5, [nn.LSTM(3, 3)])(x),
            TypeError,
            r"branches that return a tensor, but LSTM returned tuple",
        ),
        (lambda x: path_drop_column(0), ValueError, r"columns has to be 1 or more, but got 0"),
        (lambda x: path_drop_column(2, 3, "x"), ValueError, r"'local', 'global', 'mixed', but got"),
    ],
)
def test_messages(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.ones(2, 3))


def test_repr():
    assert repr(PathDrop(0.15)) == "PathDrop(p=0.15, mode='row')"
    assert repr(PathDrop(0.15, mode="batch", columns=(1, 2), batch_dim=1)) == (
        "PathDrop(p=0.15, mode='batch', columns=(1, 2), batch_dim=1)"
    )
    assert "(1): ReLU()" in repr(PathDrop(0.15, [nn.Identity(), nn.ReLU()]))


# What every layer has to fulfil (tests/laws/contracts.py runs this list)


def joined(x):
    """Three branches, of which the mean of any tells which it was."""
    return x, 10 * x, 100 * x


class Joined(PathDrop):
    def forward(self, *inputs):
        return super().forward(*(inputs if len(inputs) == 3 else joined(inputs[0])))


def path_drop_law(y, p):
    """The first input is dropped with p - p**3 / 3."""
    kept = torch.tensor([1.0, 11 / 2, 101 / 2, 111 / 3], dtype=y.dtype)
    gone = (y != kept).all(1)
    return stats.binomtest(int(gone.sum()), len(gone), p - p**3 / 3).pvalue


def contract(name, shape):
    return Layer(
        name=name,
        make=Joined,
        function=lambda x, p, **more: path_drop(joined(x), p, **more),
        shape=shape,
        many=(250_000, 1),
        law=path_drop_law,
        eval_is_identity=False,
        identity_at_0=False,
        zero_at_1=False,
        allocates=4.0,  # two of them for the other inputs
    )


CONTRACTS = [contract("PathDrop", (6, 4, 3)), contract("PathDrop 4-d", (4, 8, 5, 6))]
