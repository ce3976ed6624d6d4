"""Cutout: cut rectangular holes into images, different ones into each sample."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchdrop.checks import check_choice, check_generator
from torchdrop.internals import tree_flatten, tree_unflatten
from torchdrop.layers.base import LayerWithRate, fx_node_of_call
from torchdrop.layers.cutout_boxes import PLACES, check_count, check_size, cutout_boxes
from torchdrop.layers.draws import draw_noise, in_memory_format_of, random_integers
from torchdrop.schedules import check_rate

__all__ = ["Cutout", "cutout"]


def check_fill(fill: Any) -> None:
    """Raise unless ``fill`` is a number, a sequence of numbers, "mean" or "noise".

    Raises:
        TypeError: ``fill`` is of another type.
        ValueError: ``fill`` is another string.
    """
    if isinstance(fill, str):
        check_choice(fill, ("mean", "noise"), "fill")
        return
    values = fill if isinstance(fill, (tuple, list)) else (fill,)
    if not values or any(isinstance(v, bool) or not isinstance(v, Real) for v in values):
        raise TypeError(
            "fill has to be a number, one number for each channel, 'mean' or 'noise', "
            f"but got {fill!r}"
        )


def _holes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the mask of the pixels inside the boxes of each sample: (samples, height, width)."""
    y = torch.arange(height, device=boxes.device)
    x = torch.arange(width, device=boxes.device)
    inside: Tensor | None = None
    for box in boxes.unbind(-2):
        left, top, right, bottom = box.unsqueeze(-1).unbind(-2)
        rows = (y >= top) & (y < bottom)
        columns = (x >= left) & (x < right)
        hole = rows.unsqueeze(-1) & columns.unsqueeze(-2)
        inside = hole if inside is None else inside | hole
    if inside is None:  # there are no boxes
        return boxes.new_zeros((*boxes.shape[:-2], height, width), dtype=torch.bool)
    return inside


def _fill_values(x: Tensor, fill: Any, generator: torch.Generator | None) -> Tensor | float:
    """Return the values for the holes, in a shape that broadcasts to ``x`` (..., C, H, W)."""
    if fill == "mean":
        mean = x.mean((-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        return (mean if x.is_floating_point() else mean.round()).to(x.dtype)
    if fill == "noise":
        if x.is_floating_point():
            return draw_noise(torch.randn, x, generator).to(x.dtype)
        return random_integers(torch.iinfo(x.dtype).max + 1, x.shape, x.device, generator).to(
            x.dtype
        )
    if isinstance(fill, (tuple, list)):
        if len(fill) not in (1, x.shape[-3]):
            raise ValueError(
                f"fill has to have one value for each of the {x.shape[-3]} channels, "
                f"but got {len(fill)}"
            )
        return torch.tensor(fill, dtype=x.dtype, device=x.device)[:, None, None]
    return fill  # type: ignore[no-any-return]


def _check_images_and_boxes(x: object, boxes: object) -> None:
    """Raise unless ``x`` is one image or a batch, and ``boxes`` None or boxes for it."""
    if boxes is not None and not isinstance(boxes, Tensor):
        raise TypeError(f"boxes has to be a tensor, but got {type(boxes).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"input has to be a tensor, but got {type(x).__name__}")
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"input has to be a floating-point or integer tensor, but got {x.dtype}")
    if x.dim() not in (3, 4):
        raise ValueError(
            "input has to have 3 dimensions (channels, height, width) or 4 (batch, channels, "
            f"height, width), but got {x.dim()}"
        )
    batch = x.shape[:-3]
    if boxes is not None and (
        boxes.dim() != x.dim() - 1 or boxes.shape[:-2] != batch or boxes.shape[-1] != 4
    ):
        raise ValueError(
            f"boxes has to have the shape {(*batch, 'holes', 4)} for an input of shape "
            f"{tuple(x.shape)}, but got {tuple(boxes.shape)}"
        )


def cutout(
    x: Tensor,
    size: Any,
    holes: int = 1,
    p: float = 1.0,
    training: bool = True,
    *,
    place: str = "clipped",
    fill: Any = 0.0,
    boxes: Tensor | None = None,
    return_boxes: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    """Cut rectangular holes into images, different ones into each sample.

    The centre (cy, cx) of a hole is uniform over the pixels of the image. With (h, w) the size of
    the hole, ``fill`` replaces the rows and columns::

        cy - h // 2, ..., cy - h // 2 + h - 1        cx - w // 2, ..., cx - w // 2 + w - 1

    as far as they lie in the image. A hole that fits has exactly h x w pixels, for odd and even
    sizes. The other pixels are not scaled. Pixels that are cut get no gradient.

    Args:
        x: One image (channels, height, width) or a batch (batch, channels, height, width), of any
            floating-point dtype, or of integers (uint8). Its memory format is kept.
        size: The size of a hole: an integer (pixels), a float (a fraction of each side), or a pair
            (height, width) of these.
        holes: The number of holes of each sample. They may overlap.
        p: The probability that a sample gets its holes, in [0, 1].
        training: If False, or if ``p=0``, ``x`` itself is returned.
        place: ``"clipped"``: holes may reach over the border of the image, which clips them (the
            paper). ``"inside"``: they lie within the image; a hole larger than the image covers it.
        fill: A number, one number for each channel, ``"mean"`` (of each channel of the sample) or
            ``"noise"`` (standard normal; uniform over all values for integers), in the units of
            ``x``.
        boxes: Boxes to cut instead of random ones (:func:`cutout_boxes`): (batch, holes, 4), or
            (holes, 4) for one image. ``size``, ``holes``, ``p`` and ``place`` are then not used.
        return_boxes: Whether to return ``(result, boxes)``, so that the same holes can be cut
            elsewhere.
        generator: Draws the holes and the noise, on the device of ``x``. Eager mode only.

    Returns:
        A tensor of the shape, dtype and device of ``x``; with ``return_boxes`` also the boxes.

    Raises:
        TypeError: ``x`` is not a tensor, or its dtype is bool or complex; or ``size``, ``holes``,
            ``p`` or ``fill`` is of another type than above.
        ValueError: ``x`` is neither 3-d nor 4-d; ``size``, ``holes``, ``p`` or ``place`` is out of
            range; ``fill`` is for another number of channels, or ``boxes`` has another shape.

    Reference:
        DeVries & Taylor 2017, Improved Regularization of Convolutional Neural Networks with
        Cutout, arXiv:1708.04552.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            cutout,
            (x,),
            x,
            size,
            holes,
            p,
            training,
            place=place,
            fill=fill,
            boxes=boxes,
            return_boxes=return_boxes,
            generator=generator,
        )
    check_size(size)
    check_count(holes)
    rate = check_rate(p)
    check_choice(place, PLACES, "place")
    check_fill(fill)
    check_generator(generator)
    _check_images_and_boxes(x, boxes)
    batch, height, width = x.shape[:-3], x.shape[-2], x.shape[-1]
    if not training or (boxes is None and rate == 0.0):
        no_boxes = torch.zeros((*batch, holes, 4), dtype=torch.int64, device=x.device)
        return (x, no_boxes) if return_boxes else x
    if boxes is None:
        samples = x.shape[0] if batch else 1
        boxes = cutout_boxes(
            samples, height, width, size, holes, rate,
            place=place, device=x.device, generator=generator,
        )  # fmt: skip
        if not batch:
            boxes = boxes[0]
    inside = _holes(boxes.to(x.device), height, width).unsqueeze(-3)
    out = torch.where(in_memory_format_of(x, inside), _fill_values(x, fill, generator), x).to(
        x.dtype
    )
    return (out, boxes) if return_boxes else out


# Samples as torchvision.transforms.v2 passes them. PIL and torchvision are looked up among the
# imported modules and never imported here: an image of theirs cannot exist before they are.


def _image_kind(leaf: object) -> str | None:
    """Return "pil", "video", "image" or "tensor", or None for an item that is not an image."""
    pil, tv = sys.modules.get("PIL.Image"), sys.modules.get("torchvision.tv_tensors")
    if pil is not None and isinstance(leaf, pil.Image):
        return "pil"
    if tv is not None and isinstance(leaf, tv.TVTensor):
        if isinstance(leaf, tv.Video):
            return "video"
        return "image" if isinstance(leaf, tv.Image) else None
    return "tensor" if isinstance(leaf, Tensor) else None


def _cut_pil(image: Any, boxes: Tensor, fill: Any) -> Any:
    """Return a copy of a PIL image with holes, in the mode of the image."""
    from PIL import Image, ImageStat

    bands = len(image.getbands())
    patch: Any
    if fill == "noise":
        if image.mode not in ("L", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "LA"):
            raise TypeError(f"fill='noise' needs an image of 8-bit channels, but got {image.mode}")
        count = image.width * image.height * bands
        noise = bytes(torch.randint(256, (count,), device="cpu").tolist())
        patch = Image.frombytes(image.mode, image.size, noise)
    else:
        given = fill
        if fill == "mean" and image.mode in ("F", "I"):  # ImageStat knows 8-bit images
            given = image.convert("F").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        elif fill == "mean":
            given = ImageStat.Stat(image).mean
        values = list(given) if isinstance(given, (tuple, list)) else [given]
        if len(values) not in (1, bands):
            raise ValueError(
                f"fill has to have one value for each of the {bands} channels, "
                f"but got {len(values)}"
            )
        if image.mode != "F":
            values = [int(v + 0.5) for v in values]
        patch = values[0] if bands == 1 else tuple(values * (bands // len(values)))
    image = image.copy()
    for box in boxes.tolist():
        if box[0] < box[2] and box[1] < box[3]:
            image.paste(patch.crop(box) if fill == "noise" else patch, tuple(box))
    return image


def check_sample(sample: Any) -> tuple[list[Any], list[str | None], Any]:
    """Flatten a sample: return its leaves, the kind of image of each or None, and the structure.

    Raises:
        TypeError: The sample does not contain an image.
        ValueError: An image tensor has fewer than three dimensions.
    """
    leaves, structure = tree_flatten(sample)
    kinds = [_image_kind(leaf) for leaf in leaves]
    if any(kind in ("pil", "image", "video") for kind in kinds):
        kinds = [None if kind == "tensor" else kind for kind in kinds]
    else:
        first = kinds.index("tensor") if "tensor" in kinds else len(kinds)
        kinds = [kind if i == first else None for i, kind in enumerate(kinds)]
    if not any(kinds):
        raise TypeError(
            "input has to be a tensor, a PIL image, or a sample that contains one, "
            f"but got {type(sample).__name__}"
        )
    for leaf, kind in zip(leaves, kinds, strict=True):
        if kind not in (None, "pil") and leaf.dim() < 3:
            raise ValueError(
                "an image has to have 3 dimensions (channels, height, width) or more, "
                f"but got a tensor of shape {tuple(leaf.shape)}"
            )
    return leaves, kinds, structure


def cut_sample(sample: Any, size: Any, holes: int, p: float, *, place: str, fill: Any) -> Any:
    """Apply :func:`cutout` to the images in a sample of nested lists, tuples and dicts.

    As in torchvision.transforms.v2, images are PIL images, tv_tensors.Image and tv_tensors.Video
    (whose frames share their holes). If there are none, the first plain tensor is the image.
    Images of the same size get the same holes. Other items are returned unchanged.

    Raises:
        TypeError: The sample does not contain an image.
        ValueError: An image tensor has fewer than three dimensions.
    """
    leaves, kinds, structure = check_sample(sample)
    drawn: dict[tuple[int, int, int], Tensor] = {}
    for i, (leaf, kind) in enumerate(zip(leaves, kinds, strict=True)):
        if kind is None:
            continue
        x = leaf if kind in ("pil", "tensor") else leaf.as_subclass(Tensor)
        if kind == "pil":
            samples, height, width, device = 1, leaf.height, leaf.width, torch.device("cpu")
        else:
            # A video is one sample of shape (frames, C, H, W); a batch of them is 5-d.
            batch = x.shape[: -4 if kind == "video" else -3]
            samples, device = (batch[0] if batch else 1), x.device
            height, width = x.shape[-2:]
        key = (samples, height, width)
        if key not in drawn:
            drawn[key] = cutout_boxes(
                samples, height, width, size, holes, p, place=place, device=device
            )
        boxes = drawn[key]
        if kind == "pil":
            leaves[i] = _cut_pil(leaf, boxes[0], fill)
            continue
        if kind == "video":
            frames = x.flatten(0, -4)
            each = boxes.repeat_interleave(x.shape[-4], 0)
            out = cutout(frames, size, fill=fill, boxes=each).view(x.shape)
        else:
            out = cutout(x, size, fill=fill, boxes=boxes if x.dim() == 4 else boxes[0])
        leaves[i] = out if kind == "tensor" else _as_tv_tensor(out, leaf)
    return tree_unflatten(leaves, structure)


def _as_tv_tensor(x: Tensor, like: Tensor) -> Tensor:
    wrapped: Tensor = sys.modules["torchvision.tv_tensors"].wrap(x, like=like)
    return wrapped


class Cutout(LayerWithRate):
    """Cut rectangular holes into images, different ones into each sample.

    The centre (cy, cx) of a hole is uniform over the image. In training, ``fill`` replaces these
    rows and columns, as far as they lie in the image::

        cy - h // 2, ..., cy - h // 2 + h - 1        cx - w // 2, ..., cx - w // 2 + w - 1

    In evaluation, and with p = 0, the input is returned. The layer works on batches, on any
    device, and as one of the transforms of torchvision.transforms.v2: on PIL images, tensors and
    tv_tensors.Image, alone or in a sample. Labels, boxes and masks of a sample are not changed.
    ``fill`` is in the units of the image (0 to 255 for PIL and uint8)::

        >>> train = v2.Compose([v2.RandomHorizontalFlip(), Cutout(16)])
        >>> image, label = train(image, label)

    Holes are drawn from torch's random numbers, on the device of the images. (NumPy's would be the
    same in every worker of a DataLoader.)

    Args:
        size: The size of a hole: an integer (pixels), a float (a fraction of each side), or a pair
            (height, width) of these.
        holes: The number of holes of each sample.
        p: The probability that a sample gets its holes, in [0, 1].
        place: ``"clipped"``: holes may reach over the border of the image, which clips them (the
            paper). ``"inside"``: they lie within the image.
        fill: A number, one number for each channel, ``"mean"`` or ``"noise"``
            (:func:`torchdrop.functional.cutout`, which can also cut given boxes).

    Shape:
        (channels, height, width) or (batch, channels, height, width); the output has the shape,
        dtype and memory format of the input.

    Raises:
        TypeError: ``size``, ``holes``, ``p`` or ``fill`` is of another type than above.
        ValueError: One of them is out of range, or ``place`` is unknown. A call can also raise the
            errors of :func:`torchdrop.functional.cutout`.

    Reference:
        DeVries & Taylor 2017, Improved Regularization of Convolutional Neural Networks with
        Cutout, arXiv:1708.04552.
    """

    def __init__(
        self,
        size: int | float | tuple[int | float, int | float],
        holes: int = 1,
        *,
        p: float = 1.0,
        place: str = "clipped",
        fill: float | Sequence[float] | str = 0.0,
    ) -> None:
        super().__init__()
        check_size(size)
        self.size = size
        self.holes = check_count(holes)
        self.p = p
        check_choice(place, PLACES, "place")
        self.place = place
        check_fill(fill)
        self.fill = fill

    def forward(self, *sample: Any) -> Any:
        """Return an image, a batch or a sample with holes, or the input itself in evaluation."""
        node = fx_node_of_call(self, sample, {})
        if node is not None:
            return node
        x: Any = sample[0] if len(sample) == 1 else sample
        if type(x) in (Tensor, nn.Parameter):
            return cutout(
                x, self.size, self.holes, self.p, self.training, place=self.place, fill=self.fill
            )
        if not self.training or self.p == 0.0:
            check_sample(x)
            return x
        return cut_sample(x, self.size, self.holes, self.p, place=self.place, fill=self.fill)

    def extra_repr(self) -> str:
        """Return the size, the number of holes, p, and what differs from the defaults."""
        text = f"size={self.size}, holes={self.holes}, p={self.p}"
        if self.place != "clipped":
            text += f", place={self.place!r}"
        return text if self.fill == 0.0 else text + f", fill={self.fill!r}"
