"""The networks of the benchmark, and two other ways to drop their residual branches.

Both ways use the same blocks as torchdrop. *Masked*: every branch is computed, then timm's DropPath
or torchvision's StochasticDepth sets the dropped rows to zero. *Subset*: the branch runs on some
rows, taken by indexing and put back by ``index_add`` on the flattened tensor, as in the DINO
family; in batch mode an ``if`` leaves the branch out. The number of rows is rounded at random, not
down, so that *subset* does as much work as torchdrop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from timm import create_model
from timm.layers import DropPath
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block as VitBlock
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck
from torchvision.ops import StochasticDepth

from torchdrop.app.models import CifarBlock, CifarResNet


class Encoder(nn.Module):
    """Tokens, 24 pre-norm layers 256 wide (8 heads, feed-forward 1024, no dropout), 10 classes."""

    def __init__(self, tokens: int = 128, depth: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 256)
        self.position = nn.Parameter(torch.zeros(tokens, 256))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(256, 8, 1024, 0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(256)
        self.head = nn.Linear(256, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm vit_tiny_patch16_224": lambda: create_model("vit_tiny_patch16_224"),
    "timm convnext_atto": lambda: create_model("convnext_atto"),
    "torchvision resnet50": lambda: resnet50(weights=None),
    "CIFAR resnet-110": lambda: CifarResNet(110),
    "encoder, 24 layers": Encoder,
}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the residual blocks, first to last."""
    kinds = (VitBlock, ConvNeXtBlock, Bottleneck, CifarBlock, nn.TransformerEncoderLayer)
    return [module for module in model.modules() if isinstance(module, kinds)]


def add_masks(model: nn.Module, rates: Sequence[float], mode: str) -> None:
    """Put a masking layer behind every branch."""
    for block, p in zip(blocks_of(model), rates, strict=True):
        if isinstance(block, VitBlock):
            block.drop_path1, block.drop_path2 = DropPath(p), DropPath(p)
        elif isinstance(block, ConvNeXtBlock):
            block.drop_path = DropPath(p)
        elif isinstance(block, nn.TransformerEncoderLayer):
            block.dropout1, block.dropout2 = StochasticDepth(p, mode), StochasticDepth(p, mode)
        else:  # the branch ends with its last BatchNorm
            last = "bn3" if isinstance(block, Bottleneck) else "bn2"
            norm = nn.Sequential(getattr(block, last), StochasticDepth(p, mode))
            setattr(block, last, norm)


def add_rows(x: Tensor, skip: Tensor, branch: Callable[[Tensor], Tensor], p: float) -> Tensor:
    """Return ``skip`` plus the branch on some rows of ``x``."""
    batch = len(x)
    count = math.floor(batch * (1 - p) + float(torch.rand(())))
    if count == 0:
        return skip
    rows = torch.randperm(batch, device=x.device)[:count]
    residual = branch(x[rows]).flatten(1)
    added = torch.index_add(skip.flatten(1), 0, rows, residual, alpha=1 / (1 - p))
    return added.view(skip.shape)


def add_batch(x: Tensor, skip: Tensor, branch: Callable[[Tensor], Tensor], p: float) -> Tensor:
    """Return ``skip`` plus the branch, or ``skip`` alone."""
    # The draw that torchdrop makes, so that the same seed drops the same branches.
    if float(torch.rand((), dtype=torch.float64)) < p:
        return skip
    return skip + branch(x) / (1 - p)


class Subset(nn.Module):
    """A block that computes a subset of its rows with the parameters of the given block."""

    def __init__(self, block: nn.Module, p: float, mode: str) -> None:
        super().__init__()
        self.block = block
        self.p = p
        self.add = add_rows if mode == "row" else add_batch

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        if isinstance(b, VitBlock):
            x = self.add(x, x, lambda t: b.ls1(b.attn(b.norm1(t))), self.p)
            return self.add(x, x, lambda t: b.ls2(b.mlp(b.norm2(t))), self.p)
        if isinstance(b, nn.TransformerEncoderLayer):
            x = self.add(x, x, lambda t: b._sa_block(b.norm1(t), None, None), self.p)
            return self.add(x, x, lambda t: b._ff_block(b.norm2(t)), self.p)
        if isinstance(b, ConvNeXtBlock):  # convnext_atto: convolutions throughout
            scale = b.gamma.reshape(1, -1, 1, 1)
            return self.add(x, x, lambda t: b.mlp(b.norm(b.conv_dw(t))).mul(scale), self.p)
        if isinstance(b, CifarBlock):
            out = self.add(x, b.shortcut(x), self._cifar, self.p)
            return out.relu()
        skip = x if b.downsample is None else b.downsample(x)
        return self.add(x, skip, self._bottleneck, self.p).relu()

    def _cifar(self, x: Tensor) -> Tensor:
        b = self.block
        return b.bn2(b.conv2(b.bn1(b.conv1(x)).relu()))

    def _bottleneck(self, x: Tensor) -> Tensor:
        b = self.block
        out = b.relu(b.bn1(b.conv1(x)))
        return b.bn3(b.conv3(b.relu(b.bn2(b.conv2(out)))))


def add_subsets(model: nn.Module, rates: Sequence[float], mode: str) -> None:
    """Replace every block by a :class:`Subset`."""
    chosen = dict(zip(blocks_of(model), rates, strict=True))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child in chosen:
                setattr(module, name, Subset(child, chosen[child], mode))
