"""Parts of models, and models that others changed before or change afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import torchdrop
from zoo import BARELY, assert_same, fingerprint, without_randomness

W, B = 6, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(W), nn.Linear(W, 2 * W), nn.Linear(2 * W, W)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(self.norm(x)).tanh())


class Net(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*(Block() for _ in range(blocks)))
        self.head = nn.Linear(W, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.backbone(x))
        return y


def by_hand(model: Any, x: Tensor, kept: list[Tensor], rates: list[float]) -> Tensor:
    """``Net`` with a weight on each row of each branch; its layers are called one by one."""
    for block, rows, p in zip(model.backbone, kept, rates, strict=True):
        weight = torch.zeros(len(x), 1, dtype=x.dtype)
        weight[rows] = 1 / (1 - p)
        x = x + weight * block.fc2(torch.tanh(block.fc1(block.norm(x))))
    y: Tensor = model.head(x)
    return y


def against_hand(model: nn.Module, dense: nn.Module, inner: Callable[[Any], Any]) -> None:
    """Rows dropped in ``model``: output, gradients and buffers of ``dense`` with these rows masked.

    ``inner`` finds the ``Net`` in either of them.
    """
    plan = torchdrop.get_plan(model)
    rates = [r.p for r in plan.blocks]
    x = torch.randn(B, W, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        twin = x.detach().clone().requires_grad_()
        x.grad = None
        model.zero_grad(), dense.zero_grad()
        out = model(x)
        kept = list(plan.last_kept().values())
        assert 0 < sum(map(len, kept)) < B * len(kept)
        expected = by_hand(inner(dense), twin, kept, rates)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        direction = torch.randn_like(out)
        (out * direction).sum().backward(), (expected * direction).sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-10)
        pairs = zip(model.named_parameters(), dense.parameters(), strict=True)
        for (name, mine), theirs in pairs:
            assert (mine.grad is None) == (theirs.grad is None), name
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10, msg=name)
        for (name, mine), theirs in zip(model.named_buffers(), dense.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10, msg=name)


# --- a part of a model -----------------------------------------------------------------------


def test_only_the_backbone() -> None:
    model = Net().double()
    dense, before = copy.deepcopy(model), fingerprint(model)
    plan = torchdrop.add_stochastic_depth(model.backbone, [0.5] * 3)
    assert [r.name for r in plan.blocks] == ["0", "1", "2"]
    assert fingerprint(model) == before
    against_hand(model, dense, lambda m: m)
    # the whole model knows it, too, under the names that the part has
    assert torchdrop.has_stochastic_depth(model)
    assert [r.name for r in torchdrop.get_plan(model).blocks] == ["0", "1", "2"]
    assert not torchdrop.has_stochastic_depth(model.head)
    assert_same(model.eval()(torch.ones(B, W).double()), dense.eval()(torch.ones(B, W).double()))


def test_a_second_call_is_refused_with_the_way_out() -> None:
    model = Net()
    torchdrop.add_stochastic_depth(model.backbone, 0.5)
    way_out = (
        r"'backbone\.0' already has stochastic depth.*set_p\(\.\.\.\).*remove_stochastic_depth"
    )
    with pytest.raises(ValueError, match=way_out):
        torchdrop.add_stochastic_depth(model, 0.2)
    assert [r.p for r in torchdrop.get_plan(model).blocks] == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    torchdrop.remove_stochastic_depth(model)
    assert len(torchdrop.add_stochastic_depth(model, 0.2).blocks) == 3


def test_two_parts_of_one_model() -> None:
    model = Net(4)
    first = torchdrop.add_stochastic_depth(model.backbone[:2], [1.0, 1.0])
    second = torchdrop.add_stochastic_depth(model.backbone[2:], [0.5, 0.5])
    model(torch.randn(B, W))
    assert [len(rows) for rows in first.last_kept().values()] == [0, 0]
    assert [len(rows) for rows in second.last_kept().values()] == [B // 2, B // 2]
    torchdrop.remove_stochastic_depth(model)
    assert not torchdrop.has_stochastic_depth(model)


def test_weights_that_two_blocks_share() -> None:
    model = Net().double()
    model.backbone[2].fc1.weight = model.backbone[0].fc1.weight
    model.backbone[1].norm = model.backbone[0].norm
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, [0.5] * 3)
    against_hand(model, dense, lambda m: m)


def test_frozen_parameters() -> None:
    model = Net().double()
    model.backbone[0].requires_grad_(False)
    model.backbone[1].fc1.requires_grad_(False)
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, [0.5] * 3)
    against_hand(model, dense, lambda m: m)
    plan.set_p([1.0] * 3)
    model.zero_grad()
    model(torch.randn(B, W).double()).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


# --- layers that something else changed --------------------------------------------------------


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        pruned,
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_parametrised_children(change: Callable[[nn.Module], Any], first: bool) -> None:
    """spectral_norm goes on in each forward pass in training: once, as in the dense model."""
    torch.manual_seed(3)
    model = Net().double()
    dense = copy.deepcopy(model)
    if not first:
        torchdrop.add_stochastic_depth(model, [0.5] * 3)
    for net in (model, dense):
        for block in net.backbone:
            torch.manual_seed(4)  # spectral_norm starts anywhere
            change(block.fc1)
    if first:
        torchdrop.add_stochastic_depth(model, [0.5] * 3)
    assert_same(model.eval()(torch.ones(B, W).double()), dense.eval()(torch.ones(B, W).double()))
    model.train(), dense.train()
    against_hand(model, dense, lambda m: m)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_added_before_and_after(first: bool, kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["fc1", "fc2"], r=2, lora_alpha=4, use_dora=kind == "dora"
    )
    model = Net()
    if not first:
        torchdrop.add_stochastic_depth(model, [0.5] * 3)
    wrapped = peft.get_peft_model(model, config).double()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    dense = copy.deepcopy(wrapped)
    if first:
        torchdrop.add_stochastic_depth(wrapped, [0.5] * 3)
    else:
        torchdrop.remove_stochastic_depth(dense)
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert {r.action for r in torchdrop.get_plan(wrapped).blocks} == {"skip"}
    against_hand(wrapped, dense, lambda m: m.base_model.model)
    # merged and taken off again, the model has stochastic depth still
    torch.manual_seed(1)
    x = torch.randn(B, W).double()
    torch.manual_seed(2)
    expected = wrapped(x)
    merged = wrapped.merge_and_unload()
    torch.manual_seed(2)
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-10)
    assert torchdrop.has_stochastic_depth(merged)


class QuantizableBlock(nn.Module):
    """As torchvision's: the sum is a module's, so that its range can be observed."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, 1, 1), nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(width, out, 1), nn.BatchNorm2d(out)) if out != width else None
        )
        self.sum = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y = self.sum.add(y, x if self.shortcut is None else self.shortcut(x))
        return self.relu(y)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantisation_aware_model(fused: bool) -> None:
    from torch.ao import quantization

    model = nn.Sequential(QuantizableBlock(4, 4), QuantizableBlock(4, 8), QuantizableBlock(8, 8))
    model.train()
    if fused:
        for block in model:
            pairs = [["conv1", "bn1", "relu"], ["conv2", "bn2"]]
            pairs += [["shortcut.0", "shortcut.1"]] if block.shortcut is not None else []
            quantization.fuse_modules_qat(block, pairs, inplace=True)
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model, inplace=True)
    x = torch.randn(4, 4, 8, 8)
    model(x)  # the ranges
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, [1.0, 0.5, 0.5])
    assert [r.shortcut for r in plan.blocks] == ["identity", "projection", "identity"]
    assert [r.action for r in plan.blocks] == ["skip"] * 3
    assert_same(model.eval()(x), dense.eval()(x))
    model.train(), dense.train()
    plan.set_p([BARELY] * 3)
    assert_same(model(x), dense(x))
    plan.set_p([1.0, 0.5, 0.5])
    model(x).sum().backward()
    assert [len(rows) for rows in plan.last_kept().values()] == [0, 2, 2]
    assert all(p.grad is not None for p in model.parameters())
    # what was learned converts as ever
    torchdrop.remove_stochastic_depth(model)
    quantization.convert(model.eval())


# --- wrapped models ----------------------------------------------------------------------------


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_wrapped_models_are_refused_with_the_order_to_use(whole: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def sharded(model: nn.Module) -> nn.Module:
        fully_shard(model)
        return model

    wrappers: list[tuple[Callable[[nn.Module], nn.Module], str]] = [
        (DistributedDataParallel, "is wrapped in DistributedDataParallel.*wrap it afterwards"),
        (
            lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")),
            "is wrapped in FullyShardedDataParallel.*wrap it afterwards",
        ),
        (sharded, "is already sharded by fully_shard.*shard afterwards"),
    ]
    for wrap, message in wrappers:
        model: Any = Net()
        if whole:
            model = wrap(model)
        else:
            model.backbone = wrap(model.backbone)
        with pytest.raises(ValueError, match=("^the model " if whole else "'backbone' ") + message):
            torchdrop.add_stochastic_depth(model, 0.5)
        assert not torchdrop.has_stochastic_depth(model)
    # in that order it works
    model = Net()
    torchdrop.add_stochastic_depth(model, [1.0, 0.5, 0.5])
    ddp = DistributedDataParallel(model)
    ddp(torch.randn(B, W)).sum().backward()
    assert all(p.grad is not None for p in ddp.parameters())
    with torchdrop.paused(ddp):
        assert_same(ddp(torch.ones(B, W)), model.head(model.backbone(torch.ones(B, W))))
    assert [len(rows) for rows in torchdrop.get_plan(ddp).last_kept().values()] == [0, 4, 4]


# --- torchvision's detectors and segmenters ----------------------------------------------------


def test_a_segmentation_model() -> None:
    models = pytest.importorskip("torchvision.models.segmentation")
    model = models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    without_randomness(model)
    dense, before = copy.deepcopy(model), fingerprint(model)
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert len(plan.blocks) == 10
    assert {r.action for r in plan.blocks} == {"skip"}
    assert all(r.name.startswith("backbone.") for r in plan.blocks)
    assert fingerprint(model) == before
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        assert_same(model.eval()(x)["out"], dense.eval()(x)["out"])
        model.train(), dense.train()
        plan.set_p([BARELY] * 10)
        assert_same(model(x)["out"], dense(x)["out"])
    plan.set_p(0.5)
    model(x)["out"].square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert max(plan.observed().values()) > 0


def detector() -> nn.Module:
    pytest.importorskip("torchvision")
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import FrozenBatchNorm2d

    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    small = {"box_head": TwoMLPHead(256 * 49, 16), "box_predictor": FastRCNNPredictor(16, 3)}
    few = {"rpn_pre_nms_top_n_train": 50, "rpn_pre_nms_top_n_test": 50}
    model: nn.Module = FasterRCNN(backbone, min_size=64, max_size=64, **small, **few)
    return model


@pytest.mark.parametrize("how", ["whole", "part"])
def test_a_detector_with_a_frozen_batch_norm(how: str) -> None:
    model = detector()
    dense = copy.deepcopy(model)
    if how == "whole":
        plan = torchdrop.add_stochastic_depth(model, 0.5)
        prefix = "backbone.body."
    else:
        plan = torchdrop.add_stochastic_depth(model.backbone.body, 0.5)  # type: ignore[union-attr]
        prefix = ""
    stages = [f"{prefix}layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert [r.name for r in plan.blocks] == stages
    assert {(r.action, r.reason) for r in plan.blocks} == {("skip", "")}  # no batch statistics
    images = [torch.rand(3, 64, 64) for _ in range(4)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 4
    with torch.no_grad():
        mine, theirs = model.eval()(images), dense.eval()(images)
        for one, two in zip(mine, theirs, strict=True):
            assert_same(one["boxes"], two["boxes"])
    model.train()
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert max(plan.observed().values()) > 0


# the blocks of the backbone, and where they are
DETECTORS = {
    "fasterrcnn_resnet50_fpn": (16, "backbone.body.layer"),
    "fasterrcnn_resnet50_fpn_v2": (16, "backbone.body.layer"),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (10, "backbone.body."),
    "fcos_resnet50_fpn": (16, "backbone.body.layer"),
    "keypointrcnn_resnet50_fpn": (16, "backbone.body.layer"),
    "maskrcnn_resnet50_fpn": (16, "backbone.body.layer"),
    "retinanet_resnet50_fpn": (16, "backbone.body.layer"),
    "ssdlite320_mobilenet_v3_large": (10, "backbone.features."),
}
SEGMENTERS = {
    "deeplabv3_resnet50": (16, "backbone.layer"),
    "deeplabv3_mobilenet_v3_large": (10, "backbone."),
    "fcn_resnet50": (16, "backbone.layer"),
}


@pytest.mark.parametrize("name", [*DETECTORS, *SEGMENTERS])
def test_every_detector_and_segmenter_in_one_line(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    blocks, prefix = {**DETECTORS, **SEGMENTERS}[name]
    with torch.device("meta"):
        module = models.detection if name in DETECTORS else models.segmentation
        model = getattr(module, name)(weights=None, weights_backbone=None)
    plan = torchdrop.add_stochastic_depth(model, 0.2)
    assert len(plan.blocks) == blocks
    assert all(r.name.startswith(prefix) and r.action == "skip" for r in plan.blocks)


def test_a_detector_without_residuals_is_refused() -> None:
    models = pytest.importorskip("torchvision.models.detection")
    with torch.device("meta"):
        model = models.ssd300_vgg16(weights=None, weights_backbone=None)
    with pytest.raises(ValueError, match=r"no residual branches found in this SSD"):
        torchdrop.add_stochastic_depth(model, 0.2)


class Looping(nn.Module):
    """Adds what comes out of a list of linear layers, in a forward that cannot be read."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(3))
        self.act = act

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        x = next(iter(maps.values()))
        for layer in self.layers:
            x = x + layer(x)
        return x


class Activating(Looping):
    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        x = next(iter(maps.values()))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Inheriting(Activating):
    """Its own source adds nothing."""


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (lambda: Looping(nn.Identity()), False),
        (lambda: Looping(Swish()), True),
        (lambda: Activating(nn.Identity()), True),
        (lambda: Inheriting(nn.Identity()), True),
    ],
)
def test_a_loop_that_cannot_be_read_is_refused_where_it_may_add_branches(
    make: Callable[[], nn.Module], refused: bool
) -> None:
    model = nn.ModuleDict({"backbone": Net().backbone, "neck": make()})
    if not refused:
        assert len(torchdrop.add_stochastic_depth(model, 0.5).blocks) == 3
        return
    with pytest.raises(ValueError, match=r"'neck'.*Give example_inputs.*select=lambda r: r\.d"):
        torchdrop.add_stochastic_depth(model, 0.5)
    assert not torchdrop.has_stochastic_depth(model)
    assert len(torchdrop.add_stochastic_depth(model, 0.5, select=lambda r: r.default).blocks) == 3
