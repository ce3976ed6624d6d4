"""The holes of Cutout: check their size and number, and draw their boxes."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from torchdrop.checks import check_choice, check_generator, check_whole
from torchdrop.layers.draws import keep_mask, random_integers
from torchdrop.schedules import check_rate

__all__ = ["cutout_boxes"]

PLACES = ("clipped", "inside")


def check_size(size: Any) -> tuple[int | float, int | float]:
    """Return the height and width of a hole, each in pixels (int) or as a fraction (float).

    Raises:
        TypeError: ``size`` is neither a number nor a pair of numbers.
        ValueError: A number of pixels is below 1, or a fraction is not in (0, 1].
    """
    sizes = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    numbers = all(isinstance(s, Real) and not isinstance(s, bool) for s in sizes)
    if len(sizes) != 2 or not numbers:
        raise TypeError(
            f"size has to be a number of pixels, a fraction, or a pair (height, width) of them, "
            f"but got {size!r}"
        )
    for s in sizes:
        if isinstance(s, int) and s < 1:
            raise ValueError(f"size in pixels has to be 1 or more, but got {size!r}")
        if not isinstance(s, int) and not 0.0 < s <= 1.0:
            raise ValueError(
                f"size as a fraction has to be above 0 and at most 1, but got {size!r}; "
                "for pixels pass an integer"
            )
    return sizes[0], sizes[1]


def check_count(holes: object) -> int:
    """Return the number of holes.

    Raises:
        TypeError: ``holes`` is not an integer.
        ValueError: ``holes`` is below 1.
    """
    return check_whole(holes, "holes", 1)


def _pixels(size: int | float, side: int) -> int:
    """Return the length of a hole along a side, in pixels: a fraction is rounded, to at least 1."""
    if isinstance(size, int):
        return size
    return max(1, int(size * side + 0.5))


def cutout_boxes(
    samples: int,
    height: int,
    width: int,
    size: Any,
    holes: int = 1,
    p: float = 1.0,
    *,
    place: str = "clipped",
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the holes of a batch of images, for the argument ``boxes`` of :func:`cutout`.

    Args:
        samples: The number of images.
        height: The height of the images, in pixels.
        width: The width of the images, in pixels.
        size: The size of a hole, as in :func:`cutout`.
        holes: The number of holes of each image.
        p: The probability that an image gets its holes, in [0, 1].
        place: ``"clipped"`` or ``"inside"``, as in :func:`cutout`.
        device: The device of the result.
        generator: The generator to draw from, on ``device``. Eager mode only.

    Returns:
        An int64 tensor (samples, holes, 4) of left, top, right and bottom, as torchvision's boxes
        ("XYXY"): columns left to right - 1 and rows top to bottom - 1 are cut. Boxes lie within
        the image. The boxes of an image without holes are zero, and cut nothing.

    Raises:
        TypeError: ``size`` is neither a number nor a pair of numbers, ``holes`` is not an integer,
            or ``p`` is not a real number.
        ValueError: One of them is out of range, or ``place`` is unknown.
    """
    tall, wide = check_size(size)
    check_count(holes)
    rate = check_rate(p)
    check_choice(place, PLACES, "place")
    for name, value in (("samples", samples), ("height", height), ("width", width)):
        check_whole(value, name)
    check_generator(generator)
    ends = []
    for length, side in ((_pixels(wide, width), width), (_pixels(tall, height), height)):
        if place == "inside":
            length = min(length, side)
            first = random_integers(side - length + 1, (samples, holes), device, generator)
        else:
            # The centre lies in the image. For an even length it is the pixel after the middle.
            # max: an image without pixels has no centre, but randint needs at least one value.
            first = random_integers(max(side, 1), (samples, holes), device, generator) - length // 2
        ends.append((first.clamp(min=0), (first + length).clamp(max=side)))
    (left, right), (top, bottom) = ends
    boxes = torch.stack([left, top, right, bottom], -1)
    if rate < 1.0:
        whole = keep_mask((samples, 1, 1), rate, device=device, generator=generator)
        boxes = torch.where(whole, 0, boxes)
    return boxes
