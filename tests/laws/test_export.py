"""Evaluation of an attached model is the original forward, and so goes wherever that goes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import net
from zoo import assert_same

models = pytest.importorskip("torchvision.models")


def _resnet() -> tuple[nn.Module, Tensor]:
    return models.resnet18(num_classes=5), torch.randn(2, 3, 32, 32)


def _vit() -> tuple[nn.Module, Tensor]:
    model = models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=4)
    nn.init.normal_(model.heads[0].weight)
    return model, torch.randn(2, 3, 16, 16)


def _convnext() -> tuple[nn.Module, Tensor]:
    """Has masks of its own, which are taken over."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)]
    return ConvNeXt(settings, 0.1, layer_scale=1.0, num_classes=4), torch.randn(2, 3, 32, 32)


def _own() -> tuple[nn.Module, Tensor]:
    return net(3), torch.randn(4, 6)


ALL = [_own, _resnet, _vit, _convnext]
# Each takes seconds: one with BatchNorm, one with attention.
ONNX = [("train", _resnet), ("train", _vit), ("eval", _convnext)]


@pytest.fixture(autouse=True)
def _other_peoples_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn of their own parts
        yield


def attached(make: Callable[[], tuple[nn.Module, Tensor]], scale: str) -> tuple[nn.Module, Tensor]:
    model, x = make()
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", scale=scale)
    model.train()(x)  # it has been trained, and goes on to be
    return model.eval(), x


def check(model: nn.Module, x: Tensor, exported: Callable[[Tensor], Tensor], close: bool) -> None:
    for batch in (x, torch.randn_like(x)):
        # not under no_grad, where torch takes another path through attention
        expected, out = model(batch), exported(batch)
        if close:
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        else:
            assert_same(out, expected)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("scale", ["train", "eval"])
def test_torch_export(make: Callable[[], tuple[nn.Module, Tensor]], scale: str) -> None:
    model, x = attached(make, scale)
    program = torch.export.export(model, (x,))
    assert set(program.state_dict) >= set(dict(model.named_parameters()))
    check(model, x, program.module(), close=False)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("scale", ["train", "eval"])
def test_jit_trace(make: Callable[[], tuple[nn.Module, Tensor]], scale: str) -> None:
    model, x = attached(make, scale)
    # Without torch's own check, which runs under no_grad and so finds other attention.
    check(model, x, torch.jit.trace(model, x, check_trace=False), close=False)


@pytest.mark.parametrize(("scale", "make"), ONNX)
def test_onnx(scale: str, make: Callable[[], tuple[nn.Module, Tensor]], tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime compares the outputs")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    model, x = attached(make, scale)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: batch.numpy()})[0])

    check(model, x, run, close=True)


def test_the_comparison_can_fail() -> None:
    """The twin: a model that is not the same."""
    model, x = attached(_own, "train")
    other = copy.deepcopy(model)
    torchdrop.remove_stochastic_depth(other)
    nn.init.zeros_(other[1].b.weight)
    with pytest.raises(AssertionError, match="largest difference"):
        check(model, x, torch.export.export(other, (x,)).module(), close=False)


def test_fx_and_feature_extractors_in_evaluation() -> None:
    extractors = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = attached(_resnet, "train")
    graph = torch.fx.symbolic_trace(model)
    check(model, x, graph, close=False)
    # it is read in training as well, where what is drawn would be baked in
    with pytest.raises(RuntimeError, match=r"trace it in evaluation .* or before"):
        extractors.create_feature_extractor(model, ["layer2"])
    model.eval()  # torchvision leaves it in training when that fails
    with torchdrop.paused(model):
        extractor = extractors.create_feature_extractor(model, ["layer2"]).eval()
    expected = model.layer2(model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x))))))
    assert_same(extractor(x)["layer2"], expected)


def test_script_is_refused_with_what_to_do() -> None:
    model, _ = attached(_own, "train")
    with pytest.raises(Exception, match="cannot compile a model with stochastic depth; call"):
        torch.jit.script(model)
