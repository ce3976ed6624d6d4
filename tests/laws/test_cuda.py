"""On a CUDA device: the same numbers as on a CPU, and nobody waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.app.timing import peak_bytes

models = pytest.importorskip("torchvision.models")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

CUDA = torch.device("cuda")
EVERY_WAY = [
    {"mode": "row", "sampling": "exact"},
    {"mode": "row", "sampling": "independent"},
    {"mode": "row", "sampling": "window"},
    {"mode": "row", "compute": "mask"},
    {"mode": "batch"},
]


def resnet() -> nn.Module:
    model: nn.Module = models.ResNet(models.resnet.BasicBlock, [2, 2, 1, 1], num_classes=10)
    return model


def transformer() -> nn.Module:
    model: nn.Module = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=32, mlp_dim=64
    )
    return model


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    out = model(x)
    out.square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), found


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("network", [resnet, transformer])
@pytest.mark.parametrize("how", EVERY_WAY, ids=str)
def test_the_same_numbers_as_on_a_cpu(network: Any, how: dict[str, Any]) -> None:
    here = network().double()
    torchdrop.add_stochastic_depth(here, 0.5, schedule="uniform", **how)
    there = copy.deepcopy(here).to(CUDA)
    x = torch.randn(9, 3, 32, 32, dtype=torch.float64)
    for seed in range(3):
        taken = []
        for model, images in ((here, x), (there, x.to(CUDA))):
            torch.manual_seed(seed)
            taken.append(step(model, images))
        (out, grads), (out_there, grads_there) = taken
        torch.testing.assert_close(out_there.cpu(), out, rtol=0, atol=1e-9)
        assert grads.keys() == grads_there.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grads_there[name].cpu(), grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("network", [resnet, transformer])
@pytest.mark.parametrize("how", EVERY_WAY, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nobody_waits_for_the_device(
    network: Any, how: dict[str, Any], memory_format: torch.memory_format
) -> None:
    model = network().to(CUDA, memory_format=memory_format)
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", **how)
    x = torch.randn(8, 3, 32, 32, device=CUDA).contiguous(memory_format=memory_format)
    step(model, x)  # cuDNN and cuBLAS may wait when they are used first
    with nobody_waits():
        for _ in range(4):
            step(model, x)


def test_the_test_of_waiting_can_fail() -> None:
    with nobody_waits(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device=CUDA).sum().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_mixed_precision_with_a_scaler(dtype: torch.dtype, mode: str) -> None:
    model = transformer().to(CUDA)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode=mode)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x = torch.randn(16, 3, 32, 32, device=CUDA)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = (model(x).float() - 1.0).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(0.3 < rate < 0.7 for rate in plan.observed().values()) or mode == "batch"


def test_less_memory_than_dense() -> None:
    x = torch.randn(64, 3, 64, 64, device=CUDA)
    peaks = []
    for p in (0.0, 0.5):
        torch.manual_seed(0)
        model = resnet().to(CUDA)
        torchdrop.add_stochastic_depth(model, p, schedule="uniform")
        step(model, x)
        peaks.append(peak_bytes(lambda model=model: step(model, x), CUDA))
    assert peaks[1] < 0.95 * peaks[0]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("network", [resnet, transformer])
@pytest.mark.filterwarnings("ignore")  # inductor's, of TensorFloat32 and the like
def test_compiled_it_computes_what_eager_computes(network: Any, mode: str) -> None:
    """Also with CUDA graphs, which replay what was recorded: other rows each time all the same."""
    torch.compiler.reset()
    eager = network().to(CUDA)
    plan = torchdrop.add_stochastic_depth(eager, 0.5, schedule="uniform")
    twin = copy.deepcopy(eager)
    graph, plan_of_twin = torch.compile(twin, fullgraph=True, mode=mode), torchdrop.get_plan(twin)
    x = torch.randn(16, 3, 32, 32, device=CUDA)
    kept = set()
    for number in range(8):
        for each in (plan, plan_of_twin):  # whole numbers of rows: BatchNorm sees a spare one
            each.set_p((number + 4) / 16)
        torch.manual_seed(number)
        out, grads = step(eager, x)
        torch.manual_seed(number)
        torch.compiler.cudagraph_mark_step_begin()
        out_there, grads_there = step(graph, x)
        kept.add(str(plan_of_twin.last_kept()))
        torch.testing.assert_close(out_there, out, rtol=1e-2, atol=1e-2)
        # A ResNet's first gradients differ by more than that already for weights in TensorFloat32.
        for name, grad in grads.items() if network is transformer else ():
            there = grads_there[f"_orig_mod.{name}"]
            torch.testing.assert_close(there, grad, rtol=1e-2, atol=2e-3)
    assert len(kept) == 8


@pytest.mark.parametrize("how", EVERY_WAY, ids=str)
def test_recorded_by_hand_it_says_why_that_does_not_work(how: dict[str, Any]) -> None:
    model = transformer().to(CUDA)
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", **how)
    x = torch.randn(8, 3, 32, 32, device=CUDA)
    with torch.cuda.stream(torch.cuda.Stream()):
        step(model, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="repeat this one draw"), torch.cuda.graph(graph):
        model(x)
