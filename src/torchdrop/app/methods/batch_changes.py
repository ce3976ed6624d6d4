"""Methods that change the batch and leave the network as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchdrop import functional

from .registry import Applied, Method, register

_HOLE = 0.5
"""The side of a hole of Cutout over that of the image: the paper's 16 of 32 on CIFAR-10."""


class Subsample(Applied):
    """Train on a random subset of each batch.

    The size of the subset is rounded up or down at random, so that its mean is exact.
    """

    def __init__(self, p: float) -> None:
        self.asked = p
        self.seen = 0
        self.kept = 0

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the samples that are kept."""
        batch = len(labels)
        index = torch.randperm(batch)[: self._size(batch)]
        self.seen += batch
        self.kept += len(index)
        index = index.to(labels.device)
        return images[index], labels[index]

    def _size(self, batch: int) -> int:
        wanted = batch * (1.0 - float(self.asked or 0.0))
        # BatchNorm may reject a single image, so that fewer than two become either two or none.
        smallest = min(2, batch)
        if wanted < smallest:
            return smallest * int(float(torch.rand((), dtype=torch.float64)) < wanted / smallest)
        whole = int(wanted)
        return whole + int(float(torch.rand((), dtype=torch.float64)) < wanted - whole)

    def observed(self) -> float | None:
        """Return the share of samples that were left out since the last call."""
        seen, kept = self.seen, self.kept
        self.seen = self.kept = 0
        return 1.0 - kept / seen if seen else None


def _subsample(model: nn.Module, p: float) -> Applied:
    return Subsample(p)


register(
    Method(
        "subsample",
        "control: leaves out whole samples, to the FLOPs of stochastic_depth_row",
        _subsample,
        costs_like="stochastic_depth_row",
        default=True,
    )
)


class Cutout(Applied):
    """Cut a hole into each image of a batch, at a place of its own, and count the samples cut.

    A hole is filled with the mean colour, which is 0 since the images come normalised.
    """

    def __init__(self, p: float) -> None:
        self.asked = p
        self.seen = 0
        self.cut: Tensor | None = None

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images with their holes."""
        new, boxes = functional.cutout(images, _HOLE, p=self.asked or 0.0, return_boxes=True)
        cut = torch.count_nonzero(boxes.any(-1).any(-1))
        self.seen += len(images)
        self.cut = cut if self.cut is None else self.cut + cut
        return new, labels

    def observed(self) -> float | None:
        """Return the share of samples that were cut since the last call."""
        seen, cut = self.seen, self.cut
        self.seen, self.cut = 0, None
        return int(cut) / seen if seen and cut is not None else None


def _cutout(model: nn.Module, p: float) -> Applied:
    return Cutout(p)


register(
    Method(
        "cutout",
        "augmentation: a hole of half the side in each training image, every sample its own",
        _cutout,
        p=1.0,
    )
)
