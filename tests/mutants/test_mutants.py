"""The table of mutants fits the source. Running the mutants themselves takes `make mutants`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from run_mutants import (
    ROOT,
    SOURCES,
    Mutant,
    applied,
    copy_tree,
    judge,
    load_table,
)

MUTANTS = load_table()

# They only re-export, or start the command line.
WITHOUT_BEHAVIOUR = {"__init__.py", "__main__.py", "functional.py"}


def rooms(root: Path = ROOT) -> set[str]:
    """The packages and the modules of the source that hold behaviour."""
    paths = [*(root / SOURCES).iterdir()]
    packages = {path.name for path in paths if path.is_dir() and any(path.glob("[!_]*.py"))}
    modules = {path.name for path in paths if path.suffix == ".py"} - WITHOUT_BEHAVIOUR
    return packages | modules


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_an_entry_fits_the_source(mutant: Mutant) -> None:
    assert mutant.problems() == []


def test_there_are_mutants_of_every_package() -> None:
    assert len(MUTANTS) >= 60
    assert {Path(mutant.file).parts[0] for mutant in MUTANTS} == rooms()
    # one file of a package does not stand for the others
    for package in ("rows", "layers", "tracing", "finding", "running", "attaching"):
        files = {mutant.file for mutant in MUTANTS if mutant.file.startswith(f"{package}/")}
        assert len(files) >= 3, package


# A source tree of one function, and a test of it.
FUNCTION = "def double(x):\n    return x + x\n"
MUTANT = Mutant("adds one", "small.py", "x + x", "x + 1", ("test_small.py",), "wrong numbers")


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / SOURCES).mkdir(parents=True)
    (root / SOURCES / "__init__.py").touch()
    (root / SOURCES / "small.py").write_text(FUNCTION)
    (root / "tests").mkdir()
    (root / "tests/test_small.py").write_text(
        "from torchdrop.small import double\n\n\n"
        "def test_of_three():\n    assert double(3) == 6\n\n\n"
        "def test_of_one():\n    assert double(1) == 2\n"
    )
    for name in ("pyproject.toml", "README.md"):
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"before": "x - x"}, "`before` occurs 0 times"),
        ({"before": "x"}, "`before` occurs 3 times"),
        ({"after": "x + x"}, "same text"),
        ({"file": "other.py"}, "other.py does not exist"),
        ({"tests": ("test_other.py",)}, "test_other.py does not exist"),
        ({"tests": ("test_small.py::test_of_two",)}, "has no test_of_two"),
        ({"tests": ()}, "no tests"),
        ({"why": ""}, "`why` is empty"),
    ],
)
def test_the_check_of_an_entry_can_fail(
    small_tree: Path, change: dict[str, object], message: str | None
) -> None:
    problems = replace(MUTANT, **change).problems(small_tree)  # type: ignore[arg-type]
    if message is None:
        assert problems == []
    else:
        assert message in problems[0]


def test_a_mutant_is_killed_where_a_test_notices_it_and_survives_where_none_does(
    small_tree: Path, tmp_path: Path
) -> None:
    copy = copy_tree(tmp_path / "copy", small_tree)
    noticed = judge(MUTANT, copy, 120.0)
    assert (noticed.result, noticed.expected) == ("killed", True), noticed.detail
    assert noticed.detail == "test_small.py::test_of_three"
    blind = replace(MUTANT, tests=("test_small.py::test_of_one",))
    assert judge(blind, copy, 120.0).result == "survived"
    assert not judge(blind, copy, 120.0).expected
    # what only breaks the import shows nothing about the tests
    broken = judge(replace(MUTANT, after="x +"), copy, 120.0)
    assert (broken.result, broken.expected) == ("error", False)
    assert (copy / SOURCES / "small.py").read_text() == FUNCTION
    assert (small_tree / SOURCES / "small.py").read_text() == FUNCTION


def test_a_hang_counts_as_noticed(small_tree: Path, tmp_path: Path) -> None:
    copy = copy_tree(tmp_path / "copy", small_tree)
    outcome = judge(
        replace(MUTANT, after="x + double(x - x) if x else [1 for _ in iter(int, 1)]"), copy, 3.0
    )
    assert outcome.result == "killed"
    assert outcome.detail.startswith("hangs")


def test_the_source_is_restored_after_an_error(small_tree: Path) -> None:
    path = small_tree / SOURCES / "small.py"
    seen = []

    def interrupted() -> None:
        with applied(MUTANT, small_tree):
            seen.append(path.read_text())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "x + 1" in seen[0]
    assert path.read_text() == FUNCTION
