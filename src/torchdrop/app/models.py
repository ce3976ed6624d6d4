"""Networks by name: the paper's CIFAR ResNets, torchvision's classifiers, the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from torchdrop import functional
from torchdrop.layers import PathDrop

from .errors import UserError, one_line

__all__ = ["CifarResNet", "FractalNet", "Model", "nearest_depth", "open_model"]


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


class Join(nn.Module):
    """Where columns of a FractalNet meet: PathDrop, and what it dropped.

    Args:
        inputs: How many columns meet, numbered from 0.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.drop = PathDrop(0.0)
        self.seen = 0
        self.dropped: Tensor | None = None

    def forward(self, columns: list[Tensor], column: Tensor | None) -> Tensor:
        """The mean of the columns that are kept."""
        if not self.training or column is None:
            return self.drop(*columns)  # type: ignore[no-any-return]
        # What was kept is not told. The same draws on a one for each input, in a place of its
        # own, show it: which inputs the mean is of.
        device = columns[0].device
        state = _random_state(device)
        out: Tensor = self.drop(*columns, column=column)
        _set_random_state(device, state)
        samples = len(columns[0])
        ones = torch.eye(self.inputs, device=device).expand(samples, -1, -1)
        kept = torch.count_nonzero(self.drop(*ones.unbind(1), column=column))
        dropped = samples * self.inputs - kept
        self.seen += samples * self.inputs
        self.dropped = dropped if self.dropped is None else self.dropped + dropped
        return out

    def observed(self) -> float | None:
        """The share of inputs that were dropped since the last call."""
        seen, dropped = self.seen, self.dropped
        self.seen, self.dropped = 0, None
        return int(dropped) / seen if seen and dropped is not None else None


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)  # type: ignore[no-any-return]


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _convolution(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class FractalBlock(nn.Module):
    """Columns of 1, 2, 4, ... convolutions side by side, which meet wherever several end.

    Column 0 is the deepest. Step i of its 2**(columns - 1) ends column c where 2**c divides
    i + 1; all that end there are joined, and go on from the join.
    """

    def __init__(self, in_channels: int, channels: int, columns: int) -> None:
        super().__init__()
        self.columns = columns
        steps = []
        joins = []
        for step in range(1, 2 ** (columns - 1) + 1):
            ending = [c for c in range(columns) if step % 2**c == 0]
            steps.append(
                nn.ModuleList(
                    # A column begins at the input of the block.
                    _convolution(in_channels if step == 2**c else channels, channels)
                    for c in ending
                )
            )
            joins.append(Join(len(ending)))
        self.steps = nn.ModuleList(steps)
        self.joins = nn.ModuleList(joins)

    def forward(self, x: Tensor, column: Tensor | None) -> Tensor:
        """The join of all columns, at the end of the block."""
        begun = [x] * self.columns
        for convolutions, join in zip(self.steps, self.joins, strict=True):
            assert isinstance(convolutions, nn.ModuleList)
            ended = [layer(begun[c]) for c, layer in enumerate(convolutions)]
            begun[: len(ended)] = [join(ended, column)] * len(ended)
        return begun[0]


class FractalNet(nn.Module):
    """A small FractalNet (Larsson et al. 2017): no residual connection anywhere.

    Three blocks of three columns at 16, 32 and 64 channels, 2x2 pooling between them: 12
    convolutions on the longest path, 21 in all. With ``p`` above 0, training drops paths: half of
    the samples keep one and the same column in the whole network, for the others each join drops
    its inputs with probability ``p``.
    """

    columns = 3

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks = []
        for channels in (16, 32, 64):
            blocks.append(FractalBlock(in_channels, channels, self.columns))
            in_channels = channels
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def joins(self) -> list[Join]:
        """The joins of two columns and more."""
        return [
            module for module in self.modules() if isinstance(module, Join) and module.inputs > 1
        ]

    @property
    def p(self) -> float:
        """The probability that a join drops an input; 0 drops no path at all."""
        return self.joins[0].drop.p

    @p.setter
    def p(self, value: float) -> None:
        for join in self.joins:
            join.drop.p = value

    def forward(self, x: Tensor) -> Tensor:
        """The logits of a batch of images."""
        column = None
        if self.training and self.p > 0.0:
            column = functional.path_drop_column(self.columns, len(x), "mixed", device=x.device)
        for index, block in enumerate(self.blocks):
            if index:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            x = block(x, column)
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]

    def asked(self) -> float:
        """The mean share of the inputs of a join that training is to drop.

        Of n inputs: ``p - p**n / n`` for the half that each join decides. For the half that keeps
        one of the C columns ``(n - 1) / C``, as a join is passed through with probability n / C
        and then drops n - 1 of n.
        """
        p = self.p
        if p == 0.0:
            return 0.0
        rates = [
            (p - p**n / n + (n - 1) / self.columns) / 2 for n in (j.inputs for j in self.joins)
        ]
        return sum(rates) / len(rates)

    def observed(self) -> float | None:
        """The same as it was delivered since the last call; None where nothing was dropped."""
        rates = [rate for join in self.joins if (rate := join.observed()) is not None]
        return sum(rates) / len(rates) if rates else None


@dataclass(frozen=True)
class Model:
    """A network that can be built again and again.

    Attributes:
        name: What the user typed.
        build: Makes a fresh network from the numbers of classes and of input channels.
        channels: The number of input channels it insists on, or None.
        methods: What it is compared with by default, where that is not the same as for all.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    channels: int | None = None
    methods: tuple[str, ...] | None = None


def open_model(name: str) -> Model:
    """Find the network of a name.

    That is ``resnet-N``, ``fractalnet``, ``torchvision:NAME`` or ``module:factory``.

    Raises:
        UserError: There is no such network.
    """
    if name.startswith("torchvision:"):
        return _torchvision(name)
    if ":" in name:
        return _factory(name)
    if name.startswith("resnet-") and name.removeprefix("resnet-").isdecimal():
        return _cifar(name)
    if name == "fractalnet":
        # It has no residual branch to drop.
        return Model(name, FractalNet, methods=("none", "dropout", "path_drop"))
    raise UserError(
        f"there is no model {name!r}; give resnet-N (resnet-20, -56, -110, -1202), fractalnet, "
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
