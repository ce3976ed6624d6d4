"""What the layer files define is exported: the classes by layers, the functions by functional."""

import importlib.util
import shutil
from pathlib import Path

import pytest

import torchdrop

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("exports", ROOT / "tools" / "exports.py")
exports = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(exports)


def test_everything_that_the_layer_files_define_is_exported():
    stale = [str(path.relative_to(ROOT)) for path in exports.out_of_date()]
    assert stale == [], f"out of date: {', '.join(stale)}; run `make exports`"
    for name in torchdrop.layers.__all__:
        assert getattr(torchdrop, name) is getattr(torchdrop.layers, name)
        assert name in torchdrop.__all__


@pytest.fixture
def package(tmp_path):
    """A copy of the files that define and export layers, with one layer more."""
    shutil.copytree(exports.PACKAGE / "layers", tmp_path / "layers")
    shutil.copy(exports.PACKAGE / "functional.py", tmp_path)
    (tmp_path / "layers" / "toy.py").write_text('__all__ = ["Toy", "toy", "toy_mask"]\n')
    return tmp_path


def test_a_layer_that_is_not_exported_is_noticed_and_can_be_written(package):
    classes, functions = package / "layers" / "__init__.py", package / "functional.py"
    assert exports.out_of_date(package) == [classes, functions]
    for path, text in exports.expected(package).items():
        path.write_text(text)
    assert exports.out_of_date(package) == []
    assert "from torchdrop.layers.toy import Toy\n" in classes.read_text()
    assert "from torchdrop.layers.toy import toy, toy_mask\n" in functions.read_text()
    assert '    "toy_mask",\n' in functions.read_text()


def test_a_layer_file_without_a_list_of_its_names_is_named(package):
    (package / "layers" / "toy.py").write_text("class Toy: ...\n")
    with pytest.raises(ValueError, match=r"toy\.py has to define __all__ as a list of strings"):
        exports.expected(package)
