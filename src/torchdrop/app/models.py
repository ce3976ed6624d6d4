"""Networks by name: the paper's CIFAR ResNets, torchvision's classifiers, the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .errors import UserError, one_line

__all__ = ["CifarResNet", "Model", "nearest_depth", "open_model"]


class PoolAndPad(nn.Module):
    """The shortcut without parameters: average pooling, then channels of zeros."""

    def __init__(self, stride: int, extra_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        """Shrink ``x`` by the stride and widen it by the extra channels."""
        if self.stride > 1:
            # ceil_mode, so that an odd map gets the size that the strided convolution gives it.
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        return f"stride={self.stride}, extra_channels={self.extra_channels}"


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            self.shortcut = PoolAndPad(stride, channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output: ReLU of branch plus shortcut."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + self.shortcut(x)
        return F.relu(out)


def nearest_depth(depth: int) -> int:
    """The legal depth 6n+2, n >= 1, nearest to ``depth``; the smaller of two."""
    return max(8, 6 * ((depth - 2 + 2) // 6) + 2)


class CifarResNet(nn.Module):
    """The ResNet of He et al. 2015, section 4.2, as Huang et al. 2016 train it.

    6n+2 layers: one convolution, three stages of n blocks at 16, 32 and 64 channels, one linear
    layer. Shortcuts have no parameters: identity, or average pooling and channels of zeros.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth != nearest_depth(depth):
            raise ValueError(
                f"a CIFAR ResNet has 6n+2 layers, but got {depth}; "
                f"the nearest is {nearest_depth(depth)}"
            )
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages = []
        previous = 16
        for stage, channels in enumerate((16, 32, 64)):
            strides = [2 if stage else 1] + [1] * (blocks - 1)
            layers = []
            for stride in strides:
                layers.append(CifarBlock(previous, channels, stride))
                previous = channels
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """The logits of a batch of images."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(out.mean(dim=(2, 3)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Model:
    """A network that can be built again and again.

    Attributes:
        name: What the user typed.
        build: Makes a fresh network from the numbers of classes and of input channels.
        channels: The number of input channels it insists on, or None.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    channels: int | None = None


def open_model(name: str) -> Model:
    """Find the network called ``name``: ``resnet-N``, ``torchvision:NAME`` or ``module:factory``.

    Raises:
        UserError: There is no such network.
    """
    if name.startswith("torchvision:"):
        return _torchvision(name)
    if ":" in name:
        return _factory(name)
    if name.startswith("resnet-") and name.removeprefix("resnet-").isdecimal():
        return _cifar(name)
    raise UserError(
        f"there is no model {name!r}; give resnet-N (resnet-20, -56, -110, -1202), "
        f"torchvision:NAME or package.module:factory"
    )


def _cifar(name: str) -> Model:
    depth = int(name.removeprefix("resnet-"))
    if depth != nearest_depth(depth):
        raise UserError(
            f"{name}: a CIFAR ResNet has 6n+2 layers; the nearest is resnet-{nearest_depth(depth)}"
        )
    return Model(name, lambda classes, channels: CifarResNet(depth, classes, channels))


# Both return their auxiliary classifiers' logits too in training unless told otherwise.
_WITHOUT_AUXILIARIES: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def _torchvision(name: str) -> Model:
    wanted = name.removeprefix("torchvision:")
    known = torchvision.models.list_models(module=torchvision.models)
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"torchvision has no classifier {wanted!r}{hint or '; see its model zoo'}")
    options = _WITHOUT_AUXILIARIES.get(wanted, {})

    def build(classes: int, channels: int) -> nn.Module:
        net: nn.Module = torchvision.models.get_model(
            wanted, weights=None, num_classes=classes, **options
        )
        return net

    return Model(name, build, channels=3)


def _factory(name: str) -> Model:
    module_name, _, attribute = name.partition(":")
    # As with `python -m`: a module next to the user is found.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises is the user's to see
        raise UserError(
            f"model {name!r}: importing {module_name!r} failed: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise UserError(f"model {name!r}: {module_name} has no function {attribute!r}")

    def build(classes: int, channels: int) -> nn.Module:
        offered = {"num_classes": classes, "in_channels": channels}
        parameters = inspect.signature(factory).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        arguments = {k: v for k, v in offered.items() if takes_any or k in parameters}
        try:
            net = factory(**arguments)
        except Exception as error:
            call = ", ".join(f"{k}={v}" for k, v in arguments.items())
            raise UserError(
                f"model {name!r}: {attribute}({call}) failed: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
        if not isinstance(net, nn.Module):
            raise UserError(
                f"model {name!r}: {attribute} has to return a torch.nn.Module, "
                f"but returned {type(net).__name__}"
            )
        return net

    return Model(name, build)
