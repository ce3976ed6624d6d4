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
from torch import Tensor, nn

from torchdrop import functional
from torchdrop.layers import PathDrop

from .errors import UserError, one_line

__all__ = ["MODEL_NAMES", "CifarResNet", "FractalNet", "Model", "nearest_depth", "open_model"]

MODEL_NAMES = (
    "resnet-N (N = 6n+2 layers, as resnet-20)",
    "fractalnet",
    "torchvision:NAME",
    "package.module:factory",
)
"""The forms of a name that :func:`open_model` knows."""

FRACTALNET_METHODS = ("none", "dropout", "path_drop")
"""What a FractalNet is compared with by default: it has no residual branch to drop."""


class PoolAndPad(nn.Module):
    """A shortcut without parameters: average pooling, then additional channels of zeros."""

    def __init__(self, stride: int, extra_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` pooled by the stride and padded with the additional channels."""
        if self.stride > 1:
            # With ceil_mode, so that a map of odd size shrinks as in the strided convolution.
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        """Return the arguments, for ``print(model)``."""
        return f"stride={self.stride}, extra_channels={self.extra_channels}"


class CifarBlock(nn.Module):
    """A residual block of two 3x3 convolutions, with an identity or a pooling shortcut."""

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
        """Return the ReLU of the sum of branch and shortcut."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + self.shortcut(x)
        return F.relu(out)


def nearest_depth(depth: int) -> int:
    """Return the number 6n+2, n >= 1, nearest to ``depth``; of two equally near, the smaller."""
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
        """Return the logits of a batch of images."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(out.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Join(nn.Module):
    """A join of columns of a FractalNet: PathDrop, and a count of the inputs that it drops.

    Args:
        inputs: The number of columns that are joined.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.drop = PathDrop(0.0)
        self.seen = 0
        self.dropped: Tensor | None = None

    def forward(self, columns: list[Tensor], column: Tensor | None) -> Tensor:
        """Return the mean of the columns that are kept."""
        if not self.training or column is None:
            return self.drop(*columns)  # type: ignore[no-any-return]
        # PathDrop does not report which inputs it kept. The same draws are therefore applied to
        # unit vectors, one for each input: the mean is nonzero exactly where an input was kept.
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
        """Return the share of inputs that were dropped since the last call."""
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
    """Parallel columns of convolutions, joined after every second, fourth, ... convolution.

    Column 0 is the deepest, with 2**(columns - 1) convolutions; column c has one convolution for
    2**c of column 0. Where convolutions of several columns end, their outputs are joined, and
    each of these columns continues with the joined output.
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
                    # The first convolution of a column reads the input of the block.
                    _convolution(in_channels if step == 2**c else channels, channels)
                    for c in ending
                )
            )
            joins.append(Join(len(ending)))
        self.steps = nn.ModuleList(steps)
        self.joins = nn.ModuleList(joins)

    def forward(self, x: Tensor, column: Tensor | None) -> Tensor:
        """Return the join of all columns, at the end of the block."""
        inputs = [x] * self.columns
        for convolutions, join in zip(self.steps, self.joins, strict=True):
            assert isinstance(convolutions, nn.ModuleList)
            outputs = [layer(inputs[c]) for c, layer in enumerate(convolutions)]
            inputs[: len(outputs)] = [join(outputs, column)] * len(outputs)
        return inputs[0]


class FractalNet(nn.Module):
    """A small FractalNet (Larsson et al. 2017): no residual connection anywhere.

    Three blocks of three columns at 16, 32 and 64 channels, 2x2 pooling between them: 12
    convolutions on the longest path, 21 in all. With ``p`` above 0, training drops paths: for half
    of the samples a single column is kept in the whole network (global drop-path), for the others
    each join drops its inputs with probability ``p`` (local drop-path).
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
        """The joins of two or more columns."""
        return [
            module for module in self.modules() if isinstance(module, Join) and module.inputs > 1
        ]

    @property
    def p(self) -> float:
        """The probability that a join drops an input; at 0 no path is dropped."""
        return self.joins[0].drop.p

    @p.setter
    def p(self, value: float) -> None:
        for join in self.joins:
            join.drop.p = value

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        column = None
        if self.training and self.p > 0.0:
            column = functional.path_drop_column(self.columns, len(x), "mixed", device=x.device)
        for index, block in enumerate(self.blocks):
            if index:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            x = block(x, column)
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]

    def asked(self) -> float:
        """Return the expected share of the inputs of a join that are dropped in training.

        Of n inputs, local drop-path drops the share ``p - p**n / n``, since one input is kept
        where all would be dropped. Global drop-path, which keeps one of C columns, drops the share
        ``(n - 1) / C``: with probability n / C the column passes through the join, which then
        drops n - 1 of its n inputs. Each acts on half of the samples.
        """
        p = self.p
        if p == 0.0:
            return 0.0
        rates = [
            (p - p**n / n + (n - 1) / self.columns) / 2 for n in (j.inputs for j in self.joins)
        ]
        return sum(rates) / len(rates)

    def observed(self) -> float | None:
        """Return the mean share of the inputs of a join that was dropped since the last call.

        None where no path was dropped.
        """
        rates = [rate for join in self.joins if (rate := join.observed()) is not None]
        return sum(rates) / len(rates) if rates else None


@dataclass(frozen=True)
class Model:
    """A network by its name, to be built once for each run.

    Attributes:
        name: The name on the command line.
        build: Returns a new network, given the number of classes and of input channels.
        channels: The number of input channels that the network requires; None for any.
        methods: The methods that it is compared with by default; None for those of all networks.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    channels: int | None = None
    methods: tuple[str, ...] | None = None


def open_model(name: str) -> Model:
    """Return the network of that name, in one of the forms of :data:`MODEL_NAMES`.

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
        return Model(name, FractalNet, methods=FRACTALNET_METHODS)
    raise UserError(
        f"there is no model {name!r}; give {', '.join(MODEL_NAMES[:-1])} or {MODEL_NAMES[-1]}"
    )


def _cifar(name: str) -> Model:
    depth = int(name.removeprefix("resnet-"))
    if depth != nearest_depth(depth):
        raise UserError(
            f"{name}: a CIFAR ResNet has 6n+2 layers; the nearest is resnet-{nearest_depth(depth)}"
        )
    return Model(name, lambda classes, channels: CifarResNet(depth, classes, channels))


# By default these return the logits of auxiliary classifiers too, in training.
_WITHOUT_AUXILIARIES: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def _torchvision(name: str) -> Model:
    import torchvision  # only when needed: it takes longer to import than the rest of the command

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
    # As with `python -m`, modules in the working directory are found.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
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
