"""Every layer through every term of contracts.py, and broken layers that have to fail."""

import math

import contracts
import pytest
import torch
from contracts import CHECKS, Layer
from scipy import stats
from torch import nn

from torchdrop import functional
from torchdrop.layers import (
    Cutout,
    DropBlock1d,
    DropBlock2d,
    DropBlock3d,
    DropPath,
    GaussianDropout,
    PathDrop,
    ShakeDrop,
    SpatialDropout,
    UniformDropout,
)


def _rows_gone(y):
    return (y == 0).flatten(1).all(1)


def drop_path(name, make, shape=(6, 4, 3)):
    return Layer(
        name=name,
        make=make,
        function=functional.drop_path,
        shape=shape,
        many=(250_000, 1),
        law=contracts.masked(_rows_gone),
    )


def _one_unit_a_map(y):
    """Of each map one unit, another one from map to map: its share is the mean over the map."""
    maps = y.flatten(2).flatten(0, 1)
    return maps[torch.arange(len(maps)), torch.arange(len(maps)) % maps.shape[1]] == 0


def drop_block(name, kind, function, shape, **kwargs):
    return Layer(
        name=name,
        make=lambda p: kind(p, 3, **kwargs),
        function=lambda x, p, **more: function(x, p, 3, **kwargs, **more),
        shape=shape,
        many=(2_000, 15, *(4 for _ in shape[2:])),
        law=contracts.masked(_one_unit_a_map),
    )


def spatial(name, shape):
    return Layer(
        name=name,
        make=SpatialDropout,
        function=functional.spatial_dropout,
        shape=shape,
        many=(5_000, 50, 2),
        law=contracts.masked(lambda y: (y == 0).all(2)),
    )


def gaussian_law(y, p):
    """Of noise n around 1 with variance v, the sum of n**2 / v is chi-square."""
    total = float(((y.double() - 1) ** 2).sum()) * (1 - p) / p
    return 2 * min(stats.chi2.cdf(total, y.numel()), stats.chi2.sf(total, y.numel()))


def uniform_law(y, beta):
    """u**2 has mean 1/3 and variance 4/45, for u uniform in [-1, 1]."""
    square = ((y.double() - 1) / beta) ** 2
    z = (float(square.mean()) - 1 / 3) / math.sqrt(4 / 45 / y.numel())
    return 2 * stats.norm.sf(abs(z))


def noisy(name, make, function, law, shape, **kwargs):
    return Layer(
        name=name,
        make=make,
        function=function,
        shape=shape,
        many=(50_000, 5),
        law=law,
        zero_at_1=False,
        **kwargs,
    )


def gaussian(name, shape):
    kwargs = {"ends": (0, 0.0), "rates": (0.01, 0.3, 0.9)}
    function = functional.gaussian_dropout
    return noisy(name, GaussianDropout, function, gaussian_law, shape, **kwargs)


def uniform(name, shape):
    kwargs = {"rate": "beta", "rates": (0.1, 0.5, 1.0)}
    return noisy(name, UniformDropout, functional.uniform_dropout, uniform_law, shape, **kwargs)


def cutout(name, shape, **kwargs):
    return Layer(
        name=name,
        make=lambda p: Cutout(2, p=p, **kwargs),
        function=lambda x, p, **more: functional.cutout(x, 2, p=p, **kwargs, **more),
        shape=shape,
        many=(20_000, 1, 3, 4),
        law=contracts.masked(lambda y: (y != 1).flatten(1).any(1)),
        zero_at_1=False,
        takes_integers=True,
    )


def shake_drop(name, shape):
    return Layer(
        name=name,
        make=ShakeDrop,
        function=functional.shake_drop,
        shape=shape,
        many=(250_000, 1),
        law=contracts.masked(lambda y: (y != 1).flatten(1).all(1)),
        eval_is_identity=False,
        zero_at_1=False,
    )


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


def path_drop(name, shape):
    return Layer(
        name=name,
        make=Joined,
        function=lambda x, p, **more: functional.path_drop(joined(x), p, **more),
        shape=shape,
        many=(250_000, 1),
        law=path_drop_law,
        eval_is_identity=False,
        identity_at_0=False,
        zero_at_1=False,
        allocates=4.0,  # two of them for the other inputs
    )


LAYERS = [
    drop_path("DropPath", DropPath),
    drop_path("DropPath 4-d", DropPath, (4, 8, 5, 6)),
    drop_path("DropPath 5-d", DropPath, (4, 8, 3, 5, 6)),
    drop_block("DropBlock1d", DropBlock1d, functional.drop_block1d, (6, 4, 9)),
    drop_block("DropBlock2d", DropBlock2d, functional.drop_block2d, (4, 8, 5, 6)),
    drop_block(
        "DropBlock2d per unit", DropBlock2d, functional.drop_block2d, (4, 8, 5, 6), scale="unit"
    ),
    drop_block(
        "DropBlock2d by count", DropBlock2d, functional.drop_block2d, (4, 8, 5, 6), scale="count"
    ),
    drop_block("DropBlock3d", DropBlock3d, functional.drop_block3d, (4, 8, 3, 5, 6)),
    spatial("SpatialDropout", (4, 8, 5, 6)),
    spatial("SpatialDropout 5-d", (4, 8, 3, 5, 6)),
    gaussian("GaussianDropout", (6, 4, 3)),
    gaussian("GaussianDropout 4-d", (4, 8, 5, 6)),
    uniform("UniformDropout", (6, 4, 3)),
    uniform("UniformDropout 4-d", (4, 8, 5, 6)),
    cutout("Cutout", (4, 8, 5, 6), fill=0.5),
    cutout("Cutout of one image 3-d", (8, 5, 6), holes=2),
    shake_drop("ShakeDrop", (6, 4, 3)),
    shake_drop("ShakeDrop 4-d", (4, 8, 5, 6)),
    path_drop("PathDrop", (6, 4, 3)),
    path_drop("PathDrop 4-d", (4, 8, 5, 6)),
]
# What does not depend on the shape of the input is tested on the first of a kind.
ONCE = (
    contracts.delivers_its_rate_in_every_dtype,
    contracts.refuses_bad_rates,
    contracts.has_a_generator,
    contracts.follows_the_global_seed,
    contracts.compiles_whole,
    contracts.replays_in_a_checkpoint,
    contracts.is_a_leaf_for_fx_that_honours_eval,
    contracts.compiles_a_bounded_number_of_times_while_its_rate_changes,
)
AGAIN = ("3-d", "4-d", "5-d", "1d", "per unit")


CASES = [
    pytest.param(layer, check, id=f"{layer.name}-{check.__name__}")
    for layer in LAYERS
    for check in CHECKS
    if not (layer.name.endswith(AGAIN) and check in ONCE)
]


@pytest.mark.parametrize(("layer", "check"), CASES)
def test_contract(layer, check):
    check(layer)


class Masked(nn.Module):
    """DropPath as it is pasted from snippets: each override below is one of their mistakes."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def keep(self):
        return 1 - self.p

    def mask(self, x):
        return torch.floor(torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype) + self.keep())

    def forward(self, x):
        if not self.training or self.p == 0.0:
            return x
        return x / self.keep() * self.mask(x)


class KeepsP(Masked):
    def keep(self):
        return self.p


class AlwaysOn(Masked):
    def forward(self, x):
        return x / self.keep() * self.mask(x)


class PrivateGenerator(Masked):
    def __init__(self, p):
        super().__init__(p)
        self.generator = torch.Generator().manual_seed(0)

    def mask(self, x):
        u = torch.rand(len(x), *[1] * (x.dim() - 1), generator=self.generator)
        return (u >= self.p).to(x.dtype)


class Bernoulli(Masked):
    def mask(self, x):
        return x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(self.keep())


class Buffered(Masked):
    def __init__(self, p):
        super().__init__(p)
        self.rate = torch.tensor(p)

    def keep(self):
        return 1 - self.rate

    def mask(self, x):
        return (torch.rand(len(x), *[1] * (x.dim() - 1)) < self.keep()).to(x.dtype)


class Closure(Masked):
    def __init__(self, p):
        super().__init__(p)
        self.rule = lambda: p


class Contiguous(Masked):
    def forward(self, x):
        return super().forward(x.contiguous())


class Wasteful(Masked):
    def forward(self, x):
        full = self.mask(x).expand_as(x).contiguous()
        return (x / self.keep() * full) * torch.ones_like(x)


class Averages(Masked):
    def forward(self, x):
        if not len(x):
            raise RuntimeError("no rows")
        return super().forward(x)


class Coupled(Masked):
    def forward(self, x):
        return super().forward(x) if float(x.abs().sum()) > 0 else x


class Float32(Masked):
    def forward(self, x):
        return super().forward(x.float())


class Fixed(Masked):
    def __init__(self, p):
        super().__init__(p)
        if p == 0.0:
            self.forward = lambda x: x


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (Masked, contracts.delivers_its_rate_in_every_dtype),
        (KeepsP, contracts.delivers_its_rate_in_every_dtype),
        (Float32, contracts.keeps_dtype_shape_and_finite_values),
        (AlwaysOn, contracts.evaluation_is_the_identity_by_object),
        (Masked, contracts.ends_are_finite_and_right),
        (Masked, contracts.what_is_dropped_is_gone_even_if_infinite),
        (PrivateGenerator, contracts.follows_the_global_seed),
        (Coupled, contracts.compiles_whole),
        (Bernoulli, contracts.runs_under_vmap),
        (PrivateGenerator, contracts.replays_in_a_checkpoint),
        (Masked, contracts.is_a_leaf_for_fx_that_honours_eval),
        (Buffered, contracts.works_on_the_meta_device),
        (Closure, contracts.pickles_and_copies),
        (Contiguous, contracts.keeps_channels_last),
        (Wasteful, contracts.allocates_its_output_and_one_mask),
        (Averages, contracts.takes_an_empty_batch),
        (Masked, contracts.refuses_bad_rates),
        (Masked, contracts.refuses_bad_inputs),
        (Fixed, contracts.can_change_its_rate),
        (Bernoulli, contracts.compiles_a_bounded_number_of_times_while_its_rate_changes),
    ],
    ids=lambda x: x.__name__,
)
@pytest.mark.filterwarnings("ignore")  # the compiler has its say about some of them
def test_contract_can_fail(broken, check):
    layer = drop_path("broken", broken, (4, 8, 5, 6))
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(layer)


def test_contract_of_the_generator_can_fail():
    def deaf(x, p, training=True, generator=None):
        return functional.drop_path(x, p, training)

    layer = drop_path("broken", DropPath)
    layer = Layer(**{**layer.__dict__, "function": deaf})
    with pytest.raises(AssertionError):
        contracts.has_a_generator(layer)


def test_every_check_has_a_layer_that_fails_it():
    marks = test_contract_can_fail.pytestmark
    cases = next(m.args[1] for m in marks if m.name == "parametrize")
    assert {c for _, c in cases} | {contracts.has_a_generator} == set(CHECKS)
