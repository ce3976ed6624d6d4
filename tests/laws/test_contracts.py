"""Every layer through every term of contracts.py, and broken layers that have to fail.

The test file of a layer in tests/layers registers it: ``CONTRACTS`` there is a list of ``Layer``.
"""

import importlib
from pathlib import Path

import contracts
import pytest
import torch
from contracts import CHECKS, Layer
from torch import nn

from torchdrop import functional, layers
from torchdrop.layers import DropPath

FILES = sorted((Path(__file__).parents[1] / "layers").glob("test_*.py"))

LAYERS = [
    layer
    for file in FILES
    for layer in getattr(importlib.import_module(file.stem), "CONTRACTS", [])
]

# It does not drop an activation but skips a module, so that these terms do not apply;
# test_stochastic_depth.py has its own.
NOT_A_LAYER_OF_ACTIVATIONS = {"StochasticDepth"}


def without_contract(names, registered):
    """The layers of ``names`` of which none is registered."""
    kinds = {kind.__name__ for layer in registered for kind in type(layer.make(0.5)).__mro__}
    return sorted(set(names) - kinds - NOT_A_LAYER_OF_ACTIVATIONS)


def test_every_layer_is_registered():
    missing = without_contract(layers.__all__, LAYERS)
    assert missing == [], (
        f"no contract for {', '.join(missing)}: add CONTRACTS = [Layer(...)] to the test file of "
        "the layer in tests/layers, as test_spatial_dropout.py has it"
    )


def test_a_layer_that_is_not_registered_is_noticed():
    others = [layer for layer in LAYERS if not layer.name.startswith("Cutout")]
    assert without_contract(layers.__all__, others) == ["Cutout"]


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


def like_drop_path(make, shape=(6, 4, 3), function=functional.drop_path):
    """The terms of DropPath, for a layer that breaks one of them."""
    return Layer(
        name="broken",
        make=make,
        function=function,
        shape=shape,
        many=(250_000, 1),
        law=contracts.masked(lambda y: (y == 0).flatten(1).all(1)),
    )


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
    layer = like_drop_path(broken, (4, 8, 5, 6))
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(layer)


def test_contract_of_the_generator_can_fail():
    def deaf(x, p, training=True, generator=None):
        return functional.drop_path(x, p, training)

    layer = like_drop_path(DropPath, function=deaf)
    with pytest.raises(AssertionError):
        contracts.has_a_generator(layer)


def test_every_check_has_a_layer_that_fails_it():
    marks = test_contract_can_fail.pytestmark
    cases = next(m.args[1] for m in marks if m.name == "parametrize")
    assert {c for _, c in cases} | {contracts.has_a_generator} == set(CHECKS)
