"""Cutout: the holes, their law, the fills, replaying, samples of torchvision.transforms.v2."""

import math
import subprocess
import sys

import pytest
import torch
from contracts import Layer, masked
from PIL import Image
from scipy import stats
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from torchdrop.functional import cutout, cutout_boxes
from torchdrop.layers import Cutout

ALPHA = 1e-6
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8]


def seeded(f, *args, **kwargs):
    torch.manual_seed(0)
    return f(*args, **kwargs)


def by_hand(x, boxes, fill=0):
    """One box at a time."""
    y = x.clone()
    for image, holes in zip(y, boxes.tolist(), strict=True):
        for left, top, right, bottom in holes:
            image[:, top:bottom, left:right] = fill
    return y


# The holes


@pytest.mark.parametrize("place", ["clipped", "inside"])
@pytest.mark.parametrize("size", [1, 4, 7, (3, 8), 0.5, (0.25, 5), 100])
@pytest.mark.parametrize("holes", [1, 3])
def test_is_what_the_boxes_say(size, holes, place):
    x = torch.rand(30, 3, 11, 14) + 1
    y, boxes = cutout(x, size, holes, 0.7, place=place, fill=-1.0, return_boxes=True)
    assert boxes.shape == (30, holes, 4)
    assert torch.equal(y, by_hand(x, boxes, -1.0))
    left, top, right, bottom = boxes.unbind(-1)
    assert ((left >= 0) & (left <= right) & (right <= 14)).all()
    assert ((top >= 0) & (top <= bottom) & (bottom <= 11)).all()


def samples_differ(op):
    holes = (op(torch.ones(64, 3, 16, 16)) == 0).any(1)
    return len({tuple(h.flatten().tolist()) for h in holes}) > 20


def test_every_sample_has_its_own_holes():
    assert samples_differ(lambda x: cutout(x, 5))


def test_one_box_for_the_whole_batch_is_the_mistake():
    assert not samples_differ(v2.RandomErasing(p=1.0))

    def snippet(x, size=5):
        y, z = torch.randint(12, (2,)).tolist()
        x = x.clone()
        x[:, :, y : y + size, z : z + size] = 0
        return x

    assert not samples_differ(snippet)


def test_a_batch_read_as_one_image_is_cut_in_stripes():
    """What a snippet for (C, H, W) that indexes x[:, y1:y2] does to (N, C, H, W)."""
    x = torch.ones(8, 3, 16, 16)
    x[:, 1:2, 3:8] = 0
    assert not x[:, 1, 3:8].any()  # all of the rows, of one channel
    holes = cutout(torch.ones(8, 3, 16, 16), 5) == 0
    assert not holes.all(-1).any()
    assert torch.equal(holes.any(1), holes.all(1))  # all channels alike


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_kept(dtype):
    x = torch.full((5, 3, 8, 8), 100).to(dtype)
    for fill in (0.0, 7, (1, 2, 3), "mean", "noise"):
        y, boxes = cutout(x, 3, fill=fill, return_boxes=True)
        assert y.dtype == dtype
        outside = by_hand(torch.ones_like(x), boxes) == 1
        assert torch.equal(y[outside], x[outside])


def test_the_global_generator_is_torchs_not_numpys():
    """Workers of a loader share NumPy's state: every one of them cuts the same holes."""
    import numpy as np

    np.random.seed(0)
    torch.manual_seed(0)
    a = Cutout(3)(torch.ones(3, 9, 9))
    np.random.seed(0)
    b = Cutout(3)(torch.ones(3, 9, 9))
    torch.manual_seed(0)
    assert not torch.equal(a, b)
    assert torch.equal(a, Cutout(3)(torch.ones(3, 9, 9)))


def test_probability_of_a_sample():
    for p in (0.2, 0.9):
        cut = (seeded(cutout, torch.ones(20_000, 1, 4, 4), 2, p=p) == 0).flatten(1).any(1)
        assert stats.binomtest(int(cut.sum()), 20_000, p).pvalue > ALPHA
    x = torch.ones(3, 1, 4, 4)
    assert cutout(x, 2, p=0) is x
    assert cutout(x, 2, training=False) is x
    y, boxes = cutout(x, 2, 3, training=False, return_boxes=True)
    assert y is x
    assert torch.equal(boxes, torch.zeros(3, 3, 4, dtype=torch.int64))


def test_what_is_cut_is_gone_and_gets_no_gradient():
    x = torch.full((4, 3, 8, 8), math.nan, requires_grad=True)
    y = cutout(x, 100, fill=2.0)
    y.sum().backward()
    assert torch.equal(y, torch.full_like(y, 2.0))
    assert torch.equal(x.grad, torch.zeros_like(x))
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    y, boxes = cutout(x, 3, return_boxes=True)
    y.sum().backward()
    assert torch.equal(x.grad, by_hand(torch.ones(4, 3, 8, 8), boxes))


# The fills


def test_fills():
    x = torch.randn(6, 3, 9, 9) + 5
    boxes = cutout_boxes(6, 9, 9, 4)
    inside = by_hand(torch.ones_like(x), boxes) == 0
    channels = cutout(x, 4, fill=(1, 2, 3), boxes=boxes)
    for c in range(3):
        assert (channels[:, c][inside[:, c]] == c + 1).all()
    mean = cutout(x, 4, fill="mean", boxes=boxes)
    expected = x.mean((2, 3), keepdim=True).expand_as(x)
    assert torch.allclose(mean[inside], expected[inside])
    noise = seeded(cutout, torch.zeros(200, 3, 32, 32), 100, fill="noise")
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > ALPHA
    levels = seeded(cutout, torch.zeros(20, 3, 32, 32, dtype=torch.uint8), 100, fill="noise")
    assert stats.chisquare(torch.bincount(levels.flatten(), minlength=256).numpy()).pvalue > ALPHA


def test_the_mean_of_a_large_image_in_half_precision_is_finite():
    x = torch.full((3, 300, 300), 100.0, dtype=torch.float16)
    assert torch.equal(cutout(x, 0.5, fill="mean"), x)
    assert torch.equal(cutout(x.to(torch.uint8), 0.5, fill="mean"), x.to(torch.uint8))


# Replaying, one image, formats


def test_boxes_are_replayed():
    x = torch.rand(6, 3, 9, 9)
    y, boxes = cutout(x, 3, 2, 0.5, return_boxes=True)
    again, same = cutout(x, 1, boxes=boxes, return_boxes=True)
    assert torch.equal(y, again)
    assert same is boxes
    one, holes = cutout(x[0], 3, 2, return_boxes=True)
    assert holes.shape == (2, 4)
    assert torch.equal(one, by_hand(x[:1], holes[None])[0])
    assert torch.equal(cutout(x[0], 3, boxes=holes), one)


def test_an_image_is_a_batch_of_one():
    x = torch.rand(3, 9, 9)
    assert torch.equal(seeded(cutout, x, 3, 2), seeded(cutout, x[None], 3, 2)[0])


def test_channels_last_and_empty():
    x = torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last)
    y = seeded(cutout, x, 3)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, seeded(cutout, x.contiguous(), 3))
    for shape in ((0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8)):
        assert cutout(torch.empty(shape), 3).shape == shape


# Samples of torchvision.transforms.v2


def picture(mode="RGB", size=(12, 10)):
    return Image.new(mode, size, (200, 100, 50) if mode == "RGB" else 200)


def as_tensor(image):
    return v2.functional.pil_to_tensor(image)


@pytest.mark.parametrize("mode", ["RGB", "L", "F"])
@pytest.mark.parametrize("fill", [7, "mean", "noise"])
def test_a_pil_image(mode, fill):
    if (mode, fill) == ("F", "noise"):
        with pytest.raises(TypeError, match="needs an image of 8-bit channels, but got F"):
            Cutout(4, fill=fill)(picture(mode))
        return
    image = picture(mode)
    before = image.tobytes()
    out = seeded(Cutout(4, fill=fill), image)
    assert isinstance(out, Image.Image)
    assert (out.mode, out.size) == (image.mode, image.size)
    assert image.tobytes() == before
    if fill != "noise":  # the same holes as in the tensor
        x = as_tensor(image)
        assert torch.equal(as_tensor(out), seeded(Cutout(4, fill=fill), x))
    else:
        assert out.tobytes() != before


def test_a_pil_image_with_a_fill_for_each_channel():
    out = as_tensor(Cutout(1.0, fill=(1, 2, 3), place="inside")(picture()))
    assert torch.equal(
        out, torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand(3, 10, 12)
    )
    with pytest.raises(ValueError, match="each of the 3 channels, but got 2"):
        Cutout(4, fill=(1, 2))(picture())


def test_a_sample_keeps_labels_boxes_and_masks():
    image = tv_tensors.Image(torch.full((3, 10, 12), 9, dtype=torch.uint8))
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor([[1, 1, 5, 5]]), format="XYXY", canvas_size=(10, 12)
        ),
        "mask": tv_tensors.Mask(torch.ones(10, 12, dtype=torch.uint8)),
        "label": torch.tensor(3),
        "name": "a",
    }
    transform = v2.Compose([v2.Identity(), Cutout(5)])
    out, kept = transform(image, target)
    assert type(out) is tv_tensors.Image
    assert not torch.equal(out, image)
    assert all(kept[key] is target[key] for key in target)
    assert (image == 9).all()
    out, kept = transform((image, target))  # a sample in one piece
    assert type(out) is tv_tensors.Image
    assert kept["label"] is target["label"]


def test_a_plain_tensor_is_the_image_only_where_there_is_no_other():
    x, label = torch.ones(3, 9, 9), torch.tensor([1.0, 2.0])
    out, same = Cutout(5)(x, label)
    assert not torch.equal(out, x)
    assert same is label
    pil, tensor = Cutout(5)(picture(), x)
    assert tensor is x
    assert pil.tobytes() != picture().tobytes()
    out, number = Cutout(5)({"x": x}, 4)
    assert number == 4
    assert not torch.equal(out["x"], x)


def test_a_pipeline_of_transforms():
    pipeline = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomHorizontalFlip(),
            Cutout(4),
            v2.ToDtype(torch.float32, scale=True),
            Cutout(3, fill="noise"),
        ]
    )
    out = pipeline(picture())
    assert type(out) is tv_tensors.Image
    assert out.dtype == torch.float32


def test_frames_of_a_clip_have_the_same_holes():
    for shape in ((5, 3, 9, 9), (4, 5, 3, 9, 9)):
        out = Cutout(4)(tv_tensors.Video(torch.ones(shape)))
        assert type(out) is tv_tensors.Video
        clips = (out == 0).view(-1, 5, 3, 9, 9)
        assert clips.flatten(1).any(1).all()
        assert torch.equal(clips.any(1), clips.all(1))
    assert any(not torch.equal(clips[0], clip) for clip in clips[1:])


def test_a_sample_in_evaluation_and_without_an_image():
    image, layer = picture(), Cutout(4).eval()
    assert layer(image) is image
    assert layer(image, 3) == (image, 3)
    for bad in (None, [1.0], "x"):
        for module in (layer, Cutout(4), Cutout(4, p=0)):
            with pytest.raises(TypeError, match=r"a sample that contains one, but got"):
                module(bad)


def test_torchvision_is_no_dependency():
    code = (
        "import sys, torch; from torchdrop.layers import Cutout;"
        "x = Cutout(3)((torch.ones(3, 9, 9), 4))[0]; assert (x == 0).any();"
        "assert not {'torchvision', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# The layer, messages


def test_the_layer_forwards_its_arguments():
    x = torch.rand(5, 3, 9, 9)
    layer = Cutout((3, 0.5), 2, p=0.7, place="inside", fill=(1, 2, 3))
    expected = seeded(cutout, x, (3, 0.5), 2, 0.7, place="inside", fill=(1, 2, 3))
    assert torch.equal(seeded(layer, x), expected)
    assert repr(layer) == ("Cutout(size=(3, 0.5), holes=2, p=0.7, place='inside', fill=(1, 2, 3))")
    assert repr(Cutout(8)) == "Cutout(size=8, holes=1, p=1.0)"
    assert isinstance(layer, nn.Module)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Cutout(0), ValueError, r"size in pixels has to be 1 or more, but got 0"),
        (lambda: Cutout(1.5), ValueError, r"a fraction .* at most 1, but got 1\.5; for pixels"),
        (lambda: Cutout((4, math.nan)), ValueError, r"a fraction .*, but got \(4, nan\)"),
        (lambda: Cutout("4"), TypeError, r"size has to be a number of pixels.*, but got '4'"),
        (lambda: Cutout(True), TypeError, r"size has to be .*, but got True"),
        (lambda: Cutout((1, 2, 3)), TypeError, r"a pair \(height, width\) of them, but got"),
        (lambda: Cutout(4, 0), ValueError, r"holes has to be 1 or more, but got 0"),
        (lambda: Cutout(4, 1.0), TypeError, r"holes has to be an integer, but got 1\.0"),
        (lambda: Cutout(4, place="x"), ValueError, r"'clipped', 'inside', but got 'x'"),
        (lambda: Cutout(4, fill="x"), ValueError, r"fill .* 'mean', 'noise', but got 'x'"),
        (lambda: Cutout(4, fill=None), TypeError, r"'mean' or 'noise', but got None"),
        (lambda: cutout(torch.ones(9, 9), 4), ValueError, r"3 dimensions .* or 4 .*, but got 2"),
        (lambda: Cutout(4)([torch.ones(9)]), ValueError, r"3 dimensions .* or more, but got .*9"),
        (lambda: Cutout(4).eval()([torch.ones(9)]), ValueError, r"3 dimensions .*, but got .*9"),
        (
            lambda: cutout(torch.ones(3, 9, 9), 4, fill=(1, 2)),
            ValueError,
            r"each of the 3 channels, but got 2",
        ),
        (
            lambda: cutout(torch.ones(2, 3, 9, 9), 4, boxes=torch.zeros(3, 1, 4)),
            ValueError,
            r"boxes has to have the shape \(2, 'holes', 4\) .* but got \(3, 1, 4\)",
        ),
        (lambda: cutout(torch.ones(3, 9, 9) > 0, 4), TypeError, r"integer tensor, but got .*bool"),
    ],
)
def test_messages(call, error, match):
    with pytest.raises(error, match=match):
        call()


# What every layer has to fulfil (tests/laws/contracts.py runs this list)


def contract(name, shape, **kwargs):
    return Layer(
        name=name,
        make=lambda p: Cutout(2, p=p, **kwargs),
        function=lambda x, p, **more: cutout(x, 2, p=p, **kwargs, **more),
        shape=shape,
        many=(20_000, 1, 3, 4),
        law=masked(lambda y: (y != 1).flatten(1).any(1)),
        zero_at_1=False,
        takes_integers=True,
    )


CONTRACTS = [
    contract("Cutout", (4, 8, 5, 6), fill=0.5),
    contract("Cutout of one image 3-d", (8, 5, 6), holes=2),
]
