"""Every classifier of torchvision: the counts and the identities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchdrop
from zoo import check_surgery, check_training

models = pytest.importorskip("torchvision.models")

# name: (blocks, branches)
RESIDUAL = {
    "convnext_base": (36, 36), "convnext_large": (36, 36), "convnext_small": (36, 36),
    "convnext_tiny": (18, 18), "efficientnet_b0": (9, 9), "efficientnet_b1": (16, 16),
    "efficientnet_b2": (16, 16), "efficientnet_b3": (19, 19), "efficientnet_b4": (25, 25),
    "efficientnet_b5": (32, 32), "efficientnet_b6": (38, 38), "efficientnet_b7": (48, 48),
    "efficientnet_v2_l": (73, 73), "efficientnet_v2_m": (51, 51), "efficientnet_v2_s": (35, 35),
    "maxvit_t": (33, 55), "mnasnet0_5": (10, 10), "mnasnet0_75": (10, 10),
    "mnasnet1_0": (10, 10), "mnasnet1_3": (10, 10), "mobilenet_v2": (10, 10),
    "mobilenet_v3_large": (10, 10), "mobilenet_v3_small": (6, 6), "regnet_x_16gf": (22, 22),
    "regnet_x_1_6gf": (18, 18), "regnet_x_32gf": (23, 23), "regnet_x_3_2gf": (25, 25),
    "regnet_x_400mf": (22, 22), "regnet_x_800mf": (16, 16), "regnet_x_8gf": (23, 23),
    "regnet_y_128gf": (27, 27), "regnet_y_16gf": (18, 18), "regnet_y_1_6gf": (27, 27),
    "regnet_y_32gf": (20, 20), "regnet_y_3_2gf": (21, 21), "regnet_y_400mf": (16, 16),
    "regnet_y_800mf": (14, 14), "regnet_y_8gf": (17, 17), "resnet101": (33, 33),
    "resnet152": (50, 50), "resnet18": (8, 8), "resnet34": (16, 16), "resnet50": (16, 16),
    "resnext101_32x8d": (33, 33), "resnext101_64x4d": (33, 33), "resnext50_32x4d": (16, 16),
    "swin_b": (24, 48), "swin_s": (24, 48), "swin_t": (12, 24), "swin_v2_b": (24, 48),
    "swin_v2_s": (24, 48), "swin_v2_t": (12, 24), "vit_b_16": (12, 24), "vit_b_32": (12, 24),
    "vit_h_14": (32, 64), "vit_l_16": (24, 48), "vit_l_32": (24, 48),
    "wide_resnet101_2": (33, 33), "wide_resnet50_2": (16, 16),
}  # fmt: skip

PLAIN = [
    "alexnet", "densenet121", "densenet161", "densenet169", "densenet201", "googlenet",
    "inception_v3", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0", "squeezenet1_0", "squeezenet1_1", "vgg11", "vgg11_bn", "vgg13",
    "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn",
]  # fmt: skip

# One of each family, for every run of the tests; the rest is for `make zoo`, and MaxViT, the
# slowest, too.
FAMILIES = {
    "convnext_tiny", "efficientnet_b0", "efficientnet_v2_s", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnet50", "resnext50_32x4d", "swin_t", "swin_v2_t", "vit_b_16",
    "alexnet", "densenet121", "googlenet", "inception_v3", "shufflenet_v2_x0_5", "squeezenet1_0",
    "vgg11",
}  # fmt: skip


def _fast_or_zoo(names: Any) -> list[Any]:
    return [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.zoo) for n in names]


def _options(name: str) -> tuple[dict[str, Any], int]:
    """How to build a model for inputs as small as it allows, and their size."""
    if name.startswith("vit_"):
        size = 2 * int(name.rpartition("_")[2])
        return {"image_size": size}, size
    if name == "maxvit_t":
        return {"input_size": (224, 224)}, 224
    if name in ("googlenet", "inception_v3"):
        return {"init_weights": False}, 299
    return {}, 64 if name.startswith(("swin", "regnet", "convnext")) else 32


def _build(name: str) -> tuple[nn.Module, torch.Tensor]:
    options, size = _options(name)
    model = getattr(models, name)(weights=None, num_classes=10, **options)
    return model, torch.randn(4 if size < 200 else 2, 3, size, size)


def test_the_lists_name_every_classifier() -> None:
    assert set(RESIDUAL) | set(PLAIN) == set(models.list_models(module=models))
    assert not set(RESIDUAL) & set(PLAIN)


@pytest.mark.parametrize("name", _fast_or_zoo(RESIDUAL))
def test_residual_classifier(name: str) -> None:
    blocks, branches = RESIDUAL[name]
    model, x = _build(name)
    check_surgery(model, x, blocks=blocks, branches=branches)
    if sum(p.numel() for p in model.parameters()) < 3e8:
        check_training(model, x)


@pytest.mark.parametrize("name", _fast_or_zoo(PLAIN))
def test_plain_classifier_is_refused_with_what_was_seen(name: str) -> None:
    model, _ = _build(name)
    message = r"no residual branches found.*looks for.*has read \d+.*wrap"
    with pytest.raises(ValueError, match=message):
        torchdrop.add_stochastic_depth(model, p=0.5)
    assert not torchdrop.has_stochastic_depth(model)
    assert torchdrop.find_residuals(model) == []
