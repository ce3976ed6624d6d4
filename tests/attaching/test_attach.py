"""The surgery: what is accepted, what is refused, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import Block, net
from torchdrop.attaching import attach
from zoo import BARELY, assert_same, fingerprint, instance_names, same_randomness

torchvision = pytest.importorskip("torchvision")
models = torchvision.models


# --- nothing else changes --------------------------------------------------------------------


def test_an_optimizer_made_before_still_works() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    torchdrop.add_stochastic_depth(model, 0.5)
    model(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_find_residuals_changes_nothing_not_even_random_numbers() -> None:
    model, x = models.resnet18(), torch.randn(2, 3, 64, 64)
    before, names, state = fingerprint(model), instance_names(model), torch.get_rng_state()
    values = copy.deepcopy(model.state_dict())
    torchdrop.find_residuals(model, x)
    assert fingerprint(model) == before
    assert instance_names(model) == names
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_stochastic_depth_and_a_plan_of_its_own(copier: str) -> None:
    model = models.resnet18(num_classes=3)
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    if copier == "deepcopy":
        twin = copy.deepcopy(model)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = torch.randn(4, 3, 64, 64)
    with same_randomness():
        expected = model(x)
    with same_randomness():
        assert_same(twin(x), expected)
    plan.set_p(1.0)
    other = torchdrop.get_plan(twin)
    assert other.blocks[-1].p == 0.5
    assert all(r.module is twin.get_submodule(r.name) for r in other.blocks)
    assert max(other.observed().values()) > 0
    torchdrop.remove_stochastic_depth(twin)
    assert torchdrop.has_stochastic_depth(model)
    assert not torchdrop.has_stochastic_depth(twin)


def test_a_copy_of_a_part_does_not_drag_the_model_along() -> None:
    model = models.resnet18()
    torchdrop.add_stochastic_depth(model, 0.5)
    whole, part = len(pickle.dumps(model)), len(pickle.dumps(model.layer1))
    own = sum(p.numel() * 4 for p in model.layer1.parameters())
    assert own < part < 1.3 * own < whole
    assert len(torchdrop.get_plan(copy.deepcopy(model.layer1)).blocks) == 2


def test_a_state_dict_holds_nothing_of_ours_and_loads_with_weights_only() -> None:
    model = models.resnet18()
    keys = list(model.state_dict())
    torchdrop.add_stochastic_depth(model, 0.5)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert list(torch.load(file, weights_only=True)) == keys


# --- masks that the model has already --------------------------------------------------------


def test_rates_are_inherited_and_the_layers_own_masks_rest() -> None:
    model = models.convnext_tiny(stochastic_depth_prob=0.4)
    inherited = [m.p for m in model.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    plan = torchdrop.add_stochastic_depth(model, p=None)
    assert [r.p for r in plan.blocks] == inherited
    # Were both at work, a kept row of the deepest block would still be zeroed at times.
    block, x = plan.blocks[-1].module, torch.randn(32, 768, 4, 4)
    nn.init.ones_(block.layer_scale)
    with torch.no_grad():
        for _ in range(5):
            changed = (block(x) != x).flatten(1).any(1).nonzero().flatten()
            assert torch.equal(changed, plan.last_kept()[plan.blocks[-1].name])


def test_a_given_rate_overrides_and_zero_means_zero() -> None:
    model = models.convnext_tiny(stochastic_depth_prob=0.9)
    plan = torchdrop.add_stochastic_depth(model, p=0.5, schedule="uniform")
    assert {r.p for r in plan.blocks} == {0.5}
    plan.set_p(0.0)
    x = torch.randn(4, 3, 32, 32)
    assert_same(model.train()(x), model.eval()(x))
    plan.set_p(None)
    assert plan.blocks[-1].p == 0.9
    torchdrop.remove_stochastic_depth(model)
    assert not torch.equal(model.train()(x), model.eval()(x))


def test_masks_of_blocks_not_selected_are_left_alone() -> None:
    model = models.convnext_tiny(stochastic_depth_prob=1.0)
    plan = torchdrop.add_stochastic_depth(
        model, p=0.0, select=lambda r: r.name.startswith("features.1.")
    )
    assert len(plan.blocks) == 3
    kept, dropped = model.features[1][2], model.features[7][2]
    nn.init.ones_(kept.layer_scale), nn.init.ones_(dropped.layer_scale)
    assert not torch.equal(kept(x := torch.randn(2, 96, 8, 8)), x)
    assert_same(dropped(y := torch.randn(2, 768, 2, 2)), y)


def test_nothing_to_inherit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"p=None uses the rates of.*has none.*give p"):
        torchdrop.add_stochastic_depth(models.resnet18(), p=None)


# --- the forms of p --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.1, 0.2, 0.3]),
        ("linear_from_zero", [0.0, 0.15, 0.3]),
        ("uniform", [0.3, 0.3, 0.3]),
    ],
)
def test_depth_rules(schedule: str, expected: list[float]) -> None:
    plan = torchdrop.add_stochastic_depth(net(), 0.3, schedule=schedule)
    assert [r.p for r in plan.blocks] == pytest.approx(expected, abs=1e-15)


def test_a_sequence_and_a_mapping() -> None:
    model = net()
    plan = torchdrop.add_stochastic_depth(model, [0.1, 0, 1])
    assert [r.p for r in plan.blocks] == [0.1, 0.0, 1.0]
    plan.set_p({"1": 0.5})
    assert [r.p for r in plan.blocks] == [0.1, 0.5, 1.0]
    torchdrop.remove_stochastic_depth(model)
    plan = torchdrop.add_stochastic_depth(model, {"2": 0.5})
    assert [r.p for r in plan.blocks] == [0.0, 0.0, 0.5]


def test_branches_of_a_block_share_its_rate_or_are_named() -> None:
    plan = torchdrop.add_stochastic_depth(models.vit_b_32(image_size=32), 0.24)
    assert [r.p for r in plan.blocks] == pytest.approx([0.02 * i for i in range(1, 13)])
    assert all(b.p == r.p for r in plan.blocks for b in r.branches)
    first = plan.blocks[0]
    assert [b.name for b in first.branches] == [
        f"{first.name}:self_attention",
        f"{first.name}:mlp",
    ]
    plan.set_p({first.branches[1].name: 0.75})
    assert [b.p for b in plan.blocks[0].branches] == pytest.approx([0.02, 0.75])


BAD_RATES: list[tuple[Any, type[Exception], str]] = [
    (float("nan"), ValueError, "between 0 and 1"),
    (1.5, ValueError, "between 0 and 1, but got 1.5"),
    (-0.1, ValueError, "between 0 and 1"),
    (float("inf"), ValueError, "between 0 and 1"),
    (True, TypeError, "real number between 0 and 1"),
    ("0.2", TypeError, "real number between 0 and 1"),
    (0.2 + 0j, TypeError, "real number"),
    (torch.tensor(0.2), TypeError, r"tensor; use \.item"),
    ([0.1, 0.2], ValueError, "expected 3, but got 2"),
    ([0.1, 0.2, 3.0], ValueError, r"p\[2\]"),
    ([0.1, None, 0.3], TypeError, r"p\[1\]"),
    ({}, ValueError, "names no block, so that nothing would be dropped; .*'2': 0.2.*p=0.0"),
    ({"layer9": 0.1}, ValueError, "'layer9'.*not a block.*its blocks are '0', '1'"),
    ({"1x": 0.1}, ValueError, "did you mean '1'"),
    ({"1": float("nan")}, ValueError, r"p\['1'\]"),
]


@pytest.mark.parametrize(("p", "error", "message"), BAD_RATES)
def test_bad_rates_change_nothing(p: Any, error: type[Exception], message: str) -> None:
    model = net()
    before, names = fingerprint(model), instance_names(model)
    with pytest.raises(error, match=message):
        torchdrop.add_stochastic_depth(model, p)
    assert fingerprint(model) == before
    assert instance_names(model) == names
    plan = torchdrop.add_stochastic_depth(model, [0.1, 0.2, 0.3])
    with pytest.raises(error, match=message):
        plan.set_p(p)
    assert [r.p for r in plan.blocks] == [0.1, 0.2, 0.3]


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": "cosine"}, ValueError, "schedule has to be one of 'linear'"),
        ({"mode": "sample"}, ValueError, "mode has to be one of 'row', 'batch', but got 'sample'"),
        ({"sampling": None}, ValueError, "sampling has to be one of 'exact'"),
        ({"scale": "none"}, ValueError, "scale has to be one of 'train', 'eval'"),
        ({"compute": True}, ValueError, "compute has to be one of 'auto'"),
        ({"sync_ranks": 1}, TypeError, "sync_ranks"),
        ({"zero_grad": None}, TypeError, "zero_grad"),
        ({"batch_dim": -1}, ValueError, "batch_dim has to be 0 or more"),
        ({"batch_dim": 0.0}, TypeError, "batch_dim has to be an integer"),
        ({"select": "layer1"}, TypeError, "select has to be a function"),
        ({"select": lambda r: False}, ValueError, "select took none of the 3 residuals"),
    ],
)
def test_bad_options_change_nothing(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = net()
    before, names = fingerprint(model), instance_names(model)
    with pytest.raises(error, match=message):
        torchdrop.add_stochastic_depth(model, 0.2, **options)
    assert fingerprint(model) == before
    assert instance_names(model) == names


def test_one_forward_is_counted_as_one() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).relu()  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"Saw 1 forward with 0 additions\."):
        torchdrop.add_stochastic_depth(Plain(), 0.2)


def test_what_is_no_module_and_what_is_attached_already() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, but got a list"):
        torchdrop.add_stochastic_depth([net()], 0.2)  # type: ignore[arg-type]
    model = net()
    torchdrop.add_stochastic_depth(model, 0.2)
    for again in (model, nn.Sequential(model, net())):
        with pytest.raises(ValueError, match=r"already; change its rates with.*set_p"):
            torchdrop.add_stochastic_depth(again, 0.3)
    assert torchdrop.get_plan(model).blocks[-1].p == 0.2
    torchdrop.remove_stochastic_depth(model)
    with pytest.raises(ValueError, match="this Sequential has no stochastic depth"):
        torchdrop.remove_stochastic_depth(model)
    with pytest.raises(ValueError, match=r"no stochastic depth.*add_stochastic_depth\(model, p\)"):
        torchdrop.get_plan(model)


def test_wrapped_models_are_refused_with_the_order_to_use() -> None:
    with pytest.raises(ValueError, match=r"wrapped in DataParallel.*wrap it afterwards"):
        torchdrop.add_stochastic_depth(nn.DataParallel(net()), 0.2)

    class Scripted(torch.jit.ScriptModule):
        pass

    with pytest.raises(ValueError, match="already TorchScript; add stochastic depth to the"):
        torchdrop.add_stochastic_depth(Scripted(), 0.2)
    with pytest.raises(ValueError, match=r"torch\.compile already.*compile afterwards"):
        torchdrop.add_stochastic_depth(torch.compile(net()), 0.2)  # type: ignore[arg-type]


class Branching(Block):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + self.b(self.a(x).tanh())
        return x


def test_a_block_that_cannot_be_read_is_named_with_its_line() -> None:
    model = nn.Sequential(Block(6), Block(6), Branching(6), Branching(6))
    names = instance_names(model)
    with pytest.raises(ValueError, match=r"'2' \(Branching\).*cannot be read.*if x\.sum\(\) > 0"):
        torchdrop.add_stochastic_depth(model, 0.2)
    assert instance_names(model) == names
    plan = torchdrop.add_stochastic_depth(model, 0.2, select=lambda r: r.default)
    assert [r.name for r in plan.blocks] == ["0", "1"]


def test_example_inputs_that_fail_leave_the_model_as_it_was() -> None:
    model = models.resnet18()
    before, names = fingerprint(model), instance_names(model)
    for given, message in (
        (torch.randn(2, 5, 32, 32), r"a tensor of shape \(2, 5, 32, 32\): RuntimeError"),
        (
            torch.randn(3, 32, 32),
            r"a tensor of shape \(3, 32, 32\): .*the batch dimension included",
        ),
        ({"image": torch.randn(2, 3, 32, 32)}, r"image=a tensor of shape .*: TypeError"),
        (
            (torch.randn(2, 3, 32, 32), 1),
            r"\(a tensor of shape \(2, 3, 32, 32\), a int\): TypeError",
        ),
        ("cat.png", r"a str: .*example_inputs is what the model is called with"),
    ):
        for call in (torchdrop.add_stochastic_depth, torchdrop.find_residuals):
            with pytest.raises(ValueError, match=rf"(?s)called with example_inputs, {message}"):
                call(model, example_inputs=given)
    assert fingerprint(model) == before
    assert instance_names(model) == names


@pytest.mark.parametrize("moment", ["attaching", "a mask", "the example", "reading", "measuring"])
def test_an_interrupt_leaves_the_model_as_it_was(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C: KeyboardInterrupt, which is no Exception."""

    class Masked(Block):
        interrupts = False

        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.drop_path = torchdrop.DropPath(0.3)

        def forward(self, x: Tensor) -> Tensor:
            if self.interrupts and isinstance(x, torch.fx.Proxy) == (moment == "reading"):
                raise KeyboardInterrupt
            return x + self.drop_path(self.b(self.act(self.a(x))))

    model = net(3, block=Masked)
    calls = {"attaching": 2, "a mask": 5}.get(moment, 0)
    real = attach.put_in_slot

    def put_in_slot(*args: Any) -> None:
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise KeyboardInterrupt
        real(*args)

    def measure(*args: Any) -> None:
        assert torchdrop.has_stochastic_depth(model)
        raise KeyboardInterrupt

    if moment in ("attaching", "a mask"):
        monkeypatch.setattr(attach, "put_in_slot", put_in_slot)
    elif moment == "measuring":
        monkeypatch.setattr(attach, "measure_shares", measure)
    else:
        Masked.interrupts = True
    before, names = fingerprint(model), instance_names(model)
    with pytest.raises(KeyboardInterrupt):
        torchdrop.add_stochastic_depth(model, 0.5, example_inputs=torch.randn(2, 6))
    assert fingerprint(model) == before
    assert instance_names(model) == names
    assert torch.is_grad_enabled()
    monkeypatch.undo()
    Masked.interrupts = False
    assert len(torchdrop.add_stochastic_depth(model, 0.5).blocks) == 3


def test_what_is_half_attached_is_taken_off() -> None:
    """An interrupt may come between any two lines."""
    model = net(2)
    names = instance_names(model)
    torchdrop.add_stochastic_depth(model, 0.5)
    del model[0].__dict__["_replicate_for_data_parallel"]
    torchdrop.remove_stochastic_depth(model)
    assert instance_names(model) == names


def test_a_model_on_the_meta_device_and_an_untouched_rng() -> None:
    with torch.device("meta"):
        model = models.resnet18()
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert model(torch.empty(4, 3, 64, 64, device="meta")).shape == (4, 1000)
    assert max(plan.observed().values()) > 0


@pytest.mark.parametrize("compute", ["skip", "mask"])
def test_compute_is_an_order(compute: str) -> None:
    plan = torchdrop.add_stochastic_depth(net(), 0.5, compute=compute)
    assert {r.action for r in plan.blocks} == {compute}


class Pointwise(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.seen: list[int] = []
        norm.register_forward_pre_hook(lambda module, args: self.seen.append(len(args[0])))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(x))


def _pointwise(rows: int, make: Any = nn.LayerNorm, **given: Any) -> tuple[nn.Module, Any, Tensor]:
    model = nn.Sequential(*(Pointwise(make(16)) for _ in range(2)))
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", **given)
    return model, plan, torch.randn(rows, 16)


def test_a_small_branch_without_matrices_is_masked_and_the_plan_says_so() -> None:
    model, plan, x = _pointwise(8)
    out = model(x)
    assert [block.seen for block in model] == [[8], [8]]
    assert {block.action for block in plan.blocks} == {"mask"}
    assert "no weight matrices: masked where p times the number of elements is below 16384" in str(plan)
    kept = plan.last_kept()
    assert [len(rows) for rows in kept.values()] == [4, 4]
    assert plan.observed() == {"0": 0.5, "1": 0.5}
    torch.manual_seed(20161009)
    skipping, plan, x = _pointwise(8, compute="skip")
    torch.testing.assert_close(skipping(x), out)  # the same rows
    assert [block.seen for block in skipping] == [[4], [4]]
    assert {block.action for block in plan.blocks} == {"skip"}
    assert "masked" not in str(plan)


def test_a_large_branch_without_matrices_is_skipped() -> None:
    model, plan, x = _pointwise(2048)
    model(x)
    assert [block.seen for block in model] == [[1024], [1024]]
    assert {block.action for block in plan.blocks} == {"skip"}
    model(x[:1024])
    assert [block.seen[1:] for block in model] == [[1024], [1024]]
    assert {block.action for block in plan.blocks} == {"mask"}


def test_what_is_always_dropped_is_not_computed_and_masked() -> None:
    model, plan, x = _pointwise(8)
    plan.set_p([0.0, 1.0])
    model(x)
    assert [block.seen for block in model] == [[8], []]
    assert {block.action for block in plan.blocks} == {"skip"}


@pytest.mark.parametrize("make", [lambda n: nn.Linear(n, n), nn.BatchNorm1d])
def test_matrices_and_batch_norm_are_never_masked_by_choice(make: Any) -> None:
    model, plan, x = _pointwise(8, make)
    model(x)
    assert [block.seen for block in model] == [[4], [4]]
    assert {block.action for block in plan.blocks} == {"skip"}


def test_remove_in_the_middle_of_training() -> None:
    model, x = net(), torch.randn(4, 6)
    expected = model(x)
    torchdrop.add_stochastic_depth(model, 0.9)
    model(x).sum().backward()
    assert torchdrop.remove_stochastic_depth(model) is model
    assert_same(model(x), expected)


def test_barely_dropping_runs_the_generated_forward() -> None:
    """The twin of the bit identities: they do compare the generated forward, not the original."""
    model, x = net(2), torch.randn(4, 6)
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    site = model[0].__dict__["forward"]
    site.train[0].forward.function = lambda self, site, x: x
    assert_same(model[0](x), x)


# --- what would add to the rate, or have none --------------------------------------------------


class Drops(nn.Module):
    """A block that calls the function by itself."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.linear, self.p = nn.Linear(6, 6), p

    def forward(self, x: Tensor) -> Tensor:
        return x + torchdrop.functional.drop_path(self.linear(x).relu(), self.p, self.training)


def test_a_function_that_drops_in_the_forward_is_refused_as_its_rate_would_add() -> None:
    model = nn.Sequential(Drops(0.5), Drops(0.5))
    with pytest.raises(ValueError, match=r"drops the branch .* itself \(drop_path\)"):
        torchdrop.add_stochastic_depth(model, 0.5)
    assert not torchdrop.has_stochastic_depth(model)
    plan = torchdrop.add_stochastic_depth(nn.Sequential(Drops(0.0), Drops(0.0)), 0.5)
    assert len(plan.blocks) == 2  # it does nothing


@pytest.mark.parametrize("around", [True, False])
def test_a_layer_around_or_inside_a_block_is_refused_as_its_rate_would_add(around: bool) -> None:
    def stage() -> nn.Module:
        return nn.Sequential(Drops(0.0), Drops(0.0))

    if around:
        model = nn.Sequential(torchdrop.StochasticDepth(stage(), 0.3), stage())
    else:
        model = nn.Sequential(*stage(), *stage())
        for block in model:
            block.linear = nn.Sequential(torchdrop.StochasticDepth(nn.Linear(6, 6), 0.3), nn.ReLU())
    with pytest.raises(ValueError, match=r"StochasticDepth with p=0\.3, which would add"):
        torchdrop.add_stochastic_depth(model, 0.5)
    assert not torchdrop.has_stochastic_depth(model)
    for layer in model.modules():
        if isinstance(layer, torchdrop.StochasticDepth):
            layer.p = 0.0
    assert len(torchdrop.add_stochastic_depth(model, 0.5).blocks) == 4
    # beside each other they have nothing to do with each other
    apart = nn.Sequential(torchdrop.StochasticDepth(nn.Linear(6, 6), 0.3), *stage())
    assert len(torchdrop.add_stochastic_depth(apart, 0.5).blocks) == 2


def test_the_rate_of_a_layer_that_was_taken_over_cannot_be_set() -> None:
    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(6, 6), torchdrop.DropPath(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.linear(x).relu())

    model = nn.Sequential(Layered(), Layered())
    torchdrop.add_stochastic_depth(model)
    with pytest.raises(ValueError, match="p of this layer cannot be set"):
        model[0].drop.p = 0.9
    assert model[0].drop.p == 0.1
    torchdrop.remove_stochastic_depth(model)
    model[0].drop.p = 0.9
    assert model[0].drop.p == 0.9


def test_a_plan_whose_block_was_replaced_refuses_rates() -> None:
    model = nn.Sequential(Drops(0.0), Drops(0.0))
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    model[1] = Drops(0.0)
    with pytest.raises(ValueError, match="blocks of the model were replaced"):
        plan.set_p(0.1)
    torchdrop.get_plan(model).set_p({"0": 0.1})


@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_a_batch_dim_that_is_not_there_is_named(compute: str) -> None:
    model = nn.Sequential(Drops(0.0), Drops(0.0))
    torchdrop.add_stochastic_depth(model, 0.5, batch_dim=5, compute=compute)
    with pytest.raises(ValueError, match=r"dimension 5 according to batch_dim.*\(4, 6\)"):
        model(torch.randn(4, 6))
