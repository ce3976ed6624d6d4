"""What training loops do with a model: checkpoints, precisions, resumes, copies, threads."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import torchdrop
from small_nets import Block, kept_mask, net
from zoo import BARELY, assert_same, without_randomness

MODES = pytest.mark.parametrize("mode", ["row", "batch"])


def gradients(model: nn.Module) -> list[Tensor]:
    assert all(p.grad is not None for p in model.parameters())
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_gradients_agree(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert any(bool(g.any()) for g in mine)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def masked(model: nn.Module, x: Tensor, plan: torchdrop.Plan) -> Tensor:
    """The dense network on the rows that the latest forward kept."""
    for name, block in model.named_children():
        p = plan.blocks[int(name)].p
        weight = kept_mask(plan, name, len(x))[:, None].to(x) / (1 - p)
        x = x + weight * block.b(block.act(block.a(x)))
    return x


# --- activation checkpoints ------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("reentrant", [True, False])
def test_timm_checkpoints(mode: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    manipulate = pytest.importorskip("timm.models._manipulate")
    monkeypatch.setattr(manipulate, "use_reentrant_ckpt", lambda: reentrant)
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=3
    )
    without_randomness(model).double()
    nn.init.normal_(model.head.weight)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode=mode)
    x = torch.randn(5, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    found, kept = [], []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        for seed in range(4):
            torch.manual_seed(seed)
            model.zero_grad()
            model(x).square().sum().backward()
            found.append(gradients(model))
            kept.append({name: rows.tolist() for name, rows in plan.last_kept().items()})
    assert kept[:4] == kept[4:]
    for mine, theirs in zip(found[:4], found[4:], strict=True):
        assert_gradients_agree(mine, theirs)


def test_the_comparison_of_checkpoints_can_fail() -> None:
    """The twin: without the generator's state the recompute draws other rows."""
    model = net(3).double()
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for preserve in (True, False):
        torch.manual_seed(0)
        model.zero_grad()
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=True, preserve_rng_state=preserve)
        y.square().sum().backward()
        found.append(gradients(model))
    with pytest.raises(AssertionError):
        assert_gradients_agree(*found)


class Counting(nn.BatchNorm1d):
    """Counts its passes: torch's own counter is a buffer, which a recompute may not keep."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


class Whole(Block):
    """Sets an attribute of its own in its forward, and so is dropped as a whole."""

    times = 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        return x + self.b(self.act(self.a(x)))


class Normed(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = Counting(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.norm(self.a(x))))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("p", [BARELY, 0.5, 1.0])
def test_batch_norm_is_updated_as_often_as_by_plain_checkpoints(reentrant: bool, p: float) -> None:
    def passes(model: nn.Sequential) -> list[int]:
        for _ in range(6):
            y = torch.randn(8, 6, requires_grad=True)
            for block in model:
                y = checkpoint(block, y, use_reentrant=reentrant)
            y.sum().backward()
        return [int(block.norm.num_batches_tracked) for block in model]

    plain, model = net(2, block=Normed), net(2, block=Normed)
    torchdrop.add_stochastic_depth(model, [p, p], mode="batch")
    dense, ours = passes(plain), passes(model)
    assert dense == [12, 12]
    if p == BARELY:
        assert ours == dense
    elif p == 1.0:
        assert ours == [0, 0]
    else:
        assert all(n < 12 and n % 2 == 0 for n in ours)


# --- precision -------------------------------------------------------------------------------

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "autocast bfloat16": (torch.float32, torch.bfloat16),
    "autocast float16": (torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, None),
    "float64": (torch.float64, None),
}


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    dtype, autocast = PRECISIONS[name]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        yield dtype


@MODES
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_every_precision_scales_exactly_and_keeps_the_dtypes(
    mode: str, name: str, compute: str
) -> None:
    """The trap: in bfloat16 1/0.9 is 1.109375, which is off by .16 % in every kept row."""
    with precision(name) as dtype:
        model = net(2).to(dtype)
        plan = torchdrop.add_stochastic_depth(
            model, 0.1, schedule="uniform", mode=mode, compute=compute
        )
        x = torch.randn(64, 6, dtype=dtype)
        dense = Block.forward(model[0], x)
        out = model[0](x)
        while not len(plan.last_kept()["0"]):
            out = model[0](x)
        branch = model[0].b(model[0].act(model[0].a(x)))
        kept = kept_mask(plan, "0", 64)[:, None]
        exact = x.double() + kept * branch.double() / 0.9
        assert out.dtype == dense.dtype
        # one rounding of the product and one of the sum
        step = torch.finfo(branch.dtype).eps * branch.double().abs()
        step += torch.finfo(out.dtype).eps * exact.abs()
        assert bool(((out.double() - exact).abs() <= step).all())
        wrong = x.double() + kept * branch.double() * torch.tensor(1 / 0.9).bfloat16().double()
        if dtype != torch.bfloat16 and branch.dtype == dtype:
            assert not bool(((out.double() - wrong).abs() <= step).all())
        out.sum().backward()
        assert all(p.grad is not None and p.grad.dtype == dtype for p in model[0].parameters())


@MODES
@pytest.mark.parametrize("name", PRECISIONS)
def test_rates_are_exact_in_every_precision(mode: str, name: str) -> None:
    """.002 would be 0 or 1/256 if it were drawn in bfloat16."""
    with precision(name) as dtype, torch.no_grad():
        model = net(1 + 1, 1).to(dtype)
        plan = torchdrop.add_stochastic_depth(
            model, [0.002, 0.3], mode=mode, sampling="independent"
        )
        steps, batch = (150, 200) if mode == "row" else (3000, 1)
        for _ in range(steps):
            model(torch.zeros(batch, 1, dtype=dtype))
        for (_, rate), p in zip(plan.observed().items(), (0.002, 0.3), strict=True):
            dropped = round(rate * steps * batch)
            assert stats.binomtest(dropped, steps * batch, p).pvalue > 1e-6
            assert stats.binomtest(dropped, steps * batch, p + 0.1).pvalue < 1e-6  # the twin


@MODES
def test_a_grad_scaler(mode: str) -> None:
    model = net(3)
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, losses = torch.randn(32, 6), []
    for step in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            given = x * (float("inf") if step == 20 else 1.0)
            value = (model(given) - 1).square().mean()
        scaler.scale(value).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if step == 20:  # a step that overflows is left out, dropped branches or not
            for old, new in zip(before, model.parameters(), strict=True):
                assert_same(old, new)
        else:
            losses.append(value.item())
    assert scaler.get_scale() == 2.0**9
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


# --- seeds, saved states ---------------------------------------------------------------------


@MODES
def test_a_seed_in_mid_run_fixes_what_follows(mode: str) -> None:
    model = net(3, 1)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode=mode)

    def draw(seed: int) -> list[Any]:
        torch.manual_seed(seed)
        run = []
        for _ in range(20):
            model(torch.zeros(6, 1))
            run.append([rows.tolist() for rows in plan.last_kept().values()])
        return run

    first = draw(1)
    assert draw(2) != first
    assert draw(1) == first


def test_a_plan_saves_its_shared_numbers_with_weights_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchdrop.attaching import plan as module

    plan = torchdrop.add_stochastic_depth(net(2), [0.1, 0.2])
    monkeypatch.setattr(module.shared_numbers, "_streams", {7: (None, 12)})
    torch.save(plan.state_dict(), tmp_path / "plan.pt")
    state = torch.load(tmp_path / "plan.pt", weights_only=True)
    assert state["shared_numbers"] == {"seed": 7, "count": 12}
    monkeypatch.setattr(module.shared_numbers, "_streams", {})
    plan.set_p(0.9)
    with pytest.raises(ValueError, match="a seed and a count"):
        plan.load_state_dict({**state, "shared_numbers": {"seed": "7"}})
    assert [r.p for r in plan.blocks] == [0.45, 0.9]
    plan.load_state_dict(state)
    assert [r.p for r in plan.blocks] == [0.1, 0.2]
    assert module.shared_numbers.state_dict() == {"seed": 7, "count": 12}


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_a_lightning_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = net(3)
            self.plan = torchdrop.add_stochastic_depth(self.net, 0.0)
            self.kept: list[Any] = []
            self.generator: Tensor | None = None

        def training_step(self, batch: Any, index: int) -> Tensor:
            if index == 0 and self.current_epoch % 2 == 0:
                self.plan.set_p(0.2 * (1 + self.current_epoch))  # holds for two epochs
            out = self.net(batch[0])
            self.kept.append([rows.tolist() for rows in self.plan.last_kept().values()])
            return out.square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

        # What a user has to write, as docs/how-it-works.md says.
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["stochastic_depth"] = self.plan.state_dict()
            checkpoint["generator"] = torch.get_rng_state()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.plan.load_state_dict(checkpoint["stochastic_depth"])
            self.generator = checkpoint["generator"]

        def on_train_start(self) -> None:
            if self.generator is not None:
                torch.set_rng_state(self.generator)

    def run(task: Task, epochs: int, resume: Path | None = None, save: Path | None = None) -> None:
        data = torch.utils.data.TensorDataset(torch.randn(16, 6, generator=torch.manual_seed(3)))
        loader = torch.utils.data.DataLoader(data, 4, generator=torch.Generator().manual_seed(0))
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, loader, ckpt_path=resume)
        if save is not None:
            trainer.save_checkpoint(save)

    file = tmp_path / "run.ckpt"
    through, first, second = Task(), Task(), Task()
    run(through, 4)
    run(first, 3, save=file)
    run(second, 4, resume=file)
    assert second.kept == through.kept[12:]
    assert [r.p for r in second.plan.blocks] == [r.p for r in through.plan.blocks]
    for mine, theirs in zip(second.parameters(), through.parameters(), strict=True):
        assert_same(mine, theirs)
    assert first.kept == through.kept[:12]


@MODES
def test_a_pickle_of_all_in_mid_run_goes_on_bit_for_bit(mode: str) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()

    model = net(3)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode=mode)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 3)
    with torchdrop.paused(model):  # a copy is not paused, whoever makes it
        pickled = pickle.dumps((model, optimizer, torch.get_rng_state()))
    train(model, optimizer, 5)
    plan.set_p(0.0)
    again, its_optimizer, generator = pickle.loads(pickled)
    assert [r.p for r in torchdrop.get_plan(again).blocks] == [0.5] * 3
    torch.set_rng_state(generator)
    train(again, its_optimizer, 5)
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert_same(mine, theirs)
    kept = torchdrop.get_plan(again).last_kept()
    assert {n: r.tolist() for n, r in kept.items()} == {
        n: r.tolist() for n, r in plan.last_kept().items()
    }


# --- what goes wrong in the middle -----------------------------------------------------------


class StoppedError(Exception):
    """What a user's hook raises."""


class Rectified(Block):
    """Its sum goes through ReLU, which keeps its result: what a branch takes is taken again."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.b(self.act(self.a(x)))).relu()


@MODES
@pytest.mark.parametrize("error", [StoppedError, KeyboardInterrupt])
def test_an_error_inside_a_branch_leaves_everything_ready_for_the_next_step(
    mode: str, error: type[BaseException]
) -> None:
    model = net(4, block=Rectified).double()
    plan = torchdrop.add_stochastic_depth(model, 0.25, schedule="uniform", mode=mode)
    plain = copy.deepcopy(model)
    torchdrop.remove_stochastic_depth(plain)
    x = torch.randn(8, 6, dtype=torch.float64)

    def stop(module: nn.Module, args: Any) -> None:
        raise error

    handle = model[2].b.register_forward_pre_hook(stop)
    rates = [r.p for r in plan.blocks]

    def states_of_sites() -> list[dict[str, Any]]:
        # what was checked in a call that went through is remembered
        return [{k: v for k, v in vars(b.forward).items() if k != "_usual"} for b in model]

    states = states_of_sites()
    stopped = 0
    for seed in range(6):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(seed % 2 == 0):
            try:
                model(x)
            except error:
                stopped += 1
    assert stopped > 2
    handle.remove()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert [r.p for r in plan.blocks] == rates
    assert states_of_sites() == states
    for _ in range(4):
        model.zero_grad(), plain.zero_grad()
        out = model(x)
        out.square().sum().backward()
        expected = x
        for name, block in plain.named_children():
            weight = kept_mask(plan, name, 8)[:, None] / 0.75
            expected = (expected + weight * block.b(block.act(block.a(expected)))).relu()
        expected.square().sum().backward()
        assert_gradients_agree(gradients(model), gradients(plain))


@MODES
@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_a_block_goes_on_in_the_mode_that_it_began_in(mode: str, compute: str) -> None:
    """Where something that runs in its first branch, or a thread, calls model.eval()."""

    class Two(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.act(self.a(x))
            return x + self.act(self.b(x))

    model, x = net(2, block=Two), torch.randn(8, 6)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", mode=mode, compute=compute
    )
    model[0].a.register_forward_pre_hook(lambda module, args: model.eval() and None)
    for _ in range(6):
        model.train()
        out = model[0](x)
        kept = plan.last_kept()
        expected = x
        for rows, layer in zip(list(kept.values())[:2], (model[0].a, model[0].b), strict=True):
            weight = torch.zeros(8, 1)
            weight[rows] = 2.0
            branch = F.linear(expected, layer.weight, layer.bias).tanh()
            expected = expected + weight * branch
        torch.testing.assert_close(out, expected)


@MODES
@pytest.mark.parametrize("compute", ["auto", "mask"])
@pytest.mark.parametrize("later", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["split", "whole"])
def test_a_rate_set_in_the_middle_of_a_block_holds_from_the_next_block_on(
    mode: str, compute: str, later: float, kind: str
) -> None:
    """As a callback does, or a thread that follows a schedule: no half-old, half-new scale."""
    block = Whole if kind == "whole" else Block
    model = net(2, block=block).double()
    x = torch.randn(6, 6, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", mode=mode, compute=compute, example_inputs=x
    )
    assert {r.action for r in plan.blocks} == {
        "mask" if compute == "mask" else "layer" if kind == "whole" else "skip"
    }
    sets: list[float] = []

    def callback(module: nn.Module, args: Any) -> None:
        sets.append(later)
        plan.set_p([later, later])

    for _ in range(8):
        sets.clear()
        plan.set_p([0.5, 0.5])
        handle = model[0].b.register_forward_pre_hook(callback)
        out = model[0](x)
        handle.remove()
        weight = kept_mask(plan, "0", 6)[:, None] * 2
        if kind == "split" and compute == "mask":
            continue  # is decided after it ran
        branch = model[0].b(model[0].act(model[0].a(x)))
        torch.testing.assert_close(out, x + weight * branch, rtol=0, atol=1e-12)
        if sets and bool(weight.any()):
            with_new_scale = x + weight / 2 / max(1 - later, 0.05) * branch
            assert not torch.allclose(out, with_new_scale)
    assert bool(model(x).isfinite().all())


# --- several forwards, derivatives -----------------------------------------------------------


@MODES
@pytest.mark.parametrize("accumulate", [True, False])
def test_several_forwards_before_and_several_backwards_into_one_gradient(
    mode: str, accumulate: bool
) -> None:
    model = net(3).double()
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode=mode)
    plain = copy.deepcopy(model)
    torchdrop.remove_stochastic_depth(plain)
    outs, expected = [], []
    for _ in range(3):
        x = torch.randn(5, 6, dtype=torch.float64)
        outs.append(model(x).square().mean())
        expected.append(masked(plain, x, plan).square().mean())
        if accumulate:
            outs.pop().backward()
    if outs:
        torch.stack(outs).prod().backward()  # as a loss that compares views
        torch.stack(expected).prod().backward()
    else:
        torch.stack(expected).sum().backward()
    assert_gradients_agree(gradients(model), gradients(plain))


def seeded(model: nn.Module, seed: int = 3) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        torch.manual_seed(seed)
        out: Tensor = model(x)
        return out

    return run


@MODES
@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_higher_derivatives(mode: str, compute: str) -> None:
    model = net(3, 3).double()
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", mode=mode, compute=compute
    )
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(seeded(model), (x,), check_forward_ad=True)
    torch.autograd.gradgradcheck(seeded(model), (x,))
    assert 0 < sum(len(rows) for rows in plan.last_kept().values()) < 12
    # a penalty on the gradient, with parameters that a dropped branch did not use
    penalty = torch.autograd.grad(seeded(model)(x).sum(), x, create_graph=True)[0].square().sum()
    penalty.backward()
    weights = [p for name, p in model.named_parameters() if name.endswith("a.weight")]
    assert all(w.grad is not None for w in weights)


@MODES
@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_torch_func(mode: str, compute: str) -> None:
    model = net(3, 3).double()
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", mode=mode, compute=compute
    )
    x, v = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], given: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(model, values, (given,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    model.zero_grad()
    seeded(model)(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
    plain = copy.deepcopy(model)
    torchdrop.remove_stochastic_depth(plain)

    def reference(given: Tensor) -> Tensor:
        return masked(plain, given, plan)

    out, tangent = torch.func.jvp(seeded(model), (x,), (v,))
    expected, expected_tangent = torch.func.jvp(reference, (x,), (v,))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(tangent, expected_tangent)
    jacobian = torch.func.jacrev(seeded(model))(x)
    torch.testing.assert_close(jacobian, torch.func.jacrev(reference)(x))
    jacfwd, jacrev = torch.func.jacfwd, torch.func.jacrev
    hessian = jacfwd(jacrev(lambda g: seeded(model)(g).pow(3).sum()), randomness="same")(x)
    torch.testing.assert_close(hessian, jacfwd(jacrev(lambda g: reference(g).pow(3).sum()))(x))


@MODES
def test_vmap_draws_for_all_alike_or_says_that_it_may_not(mode: str) -> None:
    model = net(2, 3)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode=mode)
    x = torch.randn(7, 4, 3)
    out = torch.func.vmap(seeded(model), randomness="same")(x)
    for some, given in zip(out, x, strict=True):
        torch.testing.assert_close(some, masked(model, given, plan))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(model)(x)
    with pytest.raises(RuntimeError, match="randomness='same'"):
        torch.func.vmap(model, randomness="different")(x)


# --- copies ----------------------------------------------------------------------------------


def test_an_average_of_models_has_a_plan_of_its_own() -> None:
    model = net(3)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
    plan.set_p(0.0)
    own = torchdrop.get_plan(average)
    assert [r.p for r in own.blocks] == [0.5] * 3
    assert all(site.module in set(average.modules()) for site in own._sites)
    x = torch.randn(4, 6)
    expected = x
    for block in average.module:
        expected = Block.forward(block, expected)
    assert_same(average.eval()(x), expected)
    own.set_p([1.0] * 3)
    assert_same(average.train()(x), x)
    assert [r.p for r in plan.blocks] == [0.0] * 3


@pytest.mark.parametrize("copier", [AveragedModel, copy.deepcopy])
def test_copies_of_a_compiled_model_have_rates_of_their_own(copier: Any) -> None:
    torch.compiler.reset()
    model = net(2)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    compiled, x = torch.compile(model, fullgraph=True, backend="eager"), torch.randn(8, 6)
    compiled(x).sum().backward()
    twin = copier(compiled)
    own = torchdrop.get_plan(twin)
    own.set_p([1.0, 1.0])
    assert torch.equal(twin(x), x)
    assert [r.p for r in plan.blocks] == [0.5, 0.5]
    assert not torch.equal(compiled(x), x)
    assert [len(rows) for rows in plan.last_kept().values()] == [4, 4]
    own.set_p([0.0, 0.0])
    dense = torchdrop.remove_stochastic_depth(copy.deepcopy(model))
    torch.testing.assert_close(twin(x), dense(x))


def test_update_bn_gives_the_statistics_of_training_or_paused_those_of_the_dense_model() -> None:
    model = net(2, block=Normed)
    torchdrop.add_stochastic_depth(model, [1.0, 0.5])
    average = AveragedModel(model)
    plain = copy.deepcopy(average)
    torchdrop.remove_stochastic_depth(plain)
    loader = [torch.randn(16, 6) for _ in range(4)]
    update_bn(loader, plain)
    with torchdrop.paused(average):
        update_bn(loader, average)
    for mine, theirs in zip(average.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    update_bn(loader, average)  # of what runs in training: block 0 never does
    assert int(average.module[0].norm.num_batches_tracked) == 0
    assert int(average.module[1].norm.num_batches_tracked) == 4


def replicas_of(model: nn.Module, times: int) -> list[nn.Module]:
    """What nn.DataParallel does, by hand: replicas with parameters of their own."""

    def replica(module: nn.Module) -> nn.Module:
        made: nn.Module = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            made._modules[name] = None if child is None else replica(child)
        for name, p in module._parameters.items():
            if p is not None:
                made._parameters[name] = nn.Parameter(p.detach().clone())
        return made

    return [replica(model) for _ in range(times)]


def explained(model: nn.Module, x: Tensor, out: Tensor, p: float) -> Tensor:
    """``x`` through ``model``, with those branches masked in each row that ``out`` tells."""
    rows = []
    for given, found in zip(x, out, strict=True):
        sums = [given]
        for block in model.children():
            sums += [y + block.b(block.act(block.a(y))) / (1 - p) for y in sums]
        rows.append(min(sums, key=lambda y: float((y - found).detach().abs().max())))
    return torch.stack(rows)


@MODES
def test_replicas_in_threads(mode: str) -> None:
    model = net(3).double()
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode=mode)
    replicas = replicas_of(model, 3)
    with torch.no_grad():
        for replica in replicas:
            for p in parameters_of(replica):
                p += 0.1 * torch.randn_like(p)  # so that those of the model would be wrong
    # They require gradients: which rows are kept is not seeded, and maybe none are.
    xs = [torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in replicas]
    with ThreadPoolExecutor(3) as pool:  # as parallel_apply, which needs an accelerator
        outs = list(pool.map(lambda replica, x: replica(x), replicas, xs))
    seen = plan._sites[0].branches[0].counts.rows_seen
    assert seen == 15  # replicas count for the model
    assert not any(bool(p.grad is not None) for p in model.parameters())
    for replica, x, out in zip(replicas, xs, outs, strict=True):
        expected = explained(replica, x, out, 0.5)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        wanted = [x, *parameters_of(replica)]
        mine = torch.autograd.grad(out.square().sum(), wanted)
        theirs = torch.autograd.grad(
            expected.square().sum(), wanted, allow_unused=True, materialize_grads=True
        )
        assert_gradients_agree(list(mine), list(theirs))
        wrong = explained(model, x, out, 0.5)  # the twin
        assert torch.equal(wrong, x) or not torch.allclose(wrong, out)


def parameters_of(replica: nn.Module) -> Iterator[Tensor]:
    """Of a replica, whose parameters are where DataParallel puts them."""
    for module in replica.modules():
        yield from (p for p in module._parameters.values() if p is not None)


def test_threads_that_train_copies_get_the_gradients_of_their_own_rows() -> None:
    """They share the one generator, so not which rows, but all else is as if each were alone."""
    first = net(4).double()
    torchdrop.add_stochastic_depth(first, 0.5, schedule="uniform")
    barrier = threading.Barrier(3)

    def work(model: nn.Module) -> float:
        plan = torchdrop.get_plan(model)
        plain = copy.deepcopy(model)
        torchdrop.remove_stochastic_depth(plain)
        worst = 0.0
        barrier.wait(30)
        for _ in range(30):
            x = torch.randn(5, 6, dtype=torch.float64)
            model.zero_grad(), plain.zero_grad()
            model(x).square().sum().backward()
            masked(plain, x, plan).square().sum().backward()
            for mine, theirs in zip(gradients(model), gradients(plain), strict=True):
                worst = max(worst, float((mine - theirs).abs().max()))
        return worst

    with ThreadPoolExecutor(3) as pool:
        assert max(pool.map(work, [copy.deepcopy(first) for _ in range(3)])) < 1e-11


def test_threads_train_copies_while_others_read_models() -> None:
    """torch.fx patches nn.Module for the whole process while a model is read."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        return run

    def training(seed: int) -> Callable[[], None]:
        model = net(3)
        plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def work() -> None:
            for step in range(60):
                optimizer.zero_grad()
                model(torch.randn(2 + step % 3, 6)).square().mean().backward()
                optimizer.step()
            # exactly half of each batch on average, whoever drew in between
            rates = list(plan.observed().values())
            assert all(0.3 < rate < 0.7 for rate in rates), rates

        return work

    class Drawing(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.a(x)) if random.random() > 0.5 else x

    def reading() -> None:
        for _ in range(20):
            model = net(2)
            assert len(torchdrop.add_stochastic_depth(model, 0.5).blocks) == 2
            model(torch.randn(3, 6))
            with pytest.raises(ValueError, match="it draws random numbers in Python"):
                torchdrop.add_stochastic_depth(net(2, block=Drawing), 0.5)

    threads = [
        threading.Thread(target=guarded(work))
        for work in (training(0), training(1), reading, reading)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
