"""The pages on methods and mistakes: pictures are drawn, tests that they name exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import torchdrop.app.compare as app
from torchdrop.app.methods import METHODS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CARDS = sorted((DOCS / "methods").glob("*.md"))
PAGES = sorted(DOCS.rglob("*.md"))

SPEC = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)

NAMED = r"`(tests/[\w/]+\.py)::(\w+)`"


def missing_tests(text):
    """The tests that a page names and that are not there."""
    missing = []
    for file, name in re.findall(NAMED, text):
        path = ROOT / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            missing.append(f"{file}::{name}")
    return missing


def test_every_test_named_on_the_page_of_mistakes_exists():
    text = (DOCS / "common-mistakes.md").read_text(encoding="utf-8")
    assert len(re.findall(NAMED, text)) > 40
    assert missing_tests(text) == []
    # None is written in a way that the search above would not see.
    assert text.count("tests/") == len(re.findall(NAMED, text))


def test_every_mistake_names_a_test():
    text = (DOCS / "common-mistakes.md").read_text(encoding="utf-8")
    guarded = text.split("## Not guarded against")[0]
    mistakes = [part for part in guarded.split("\n\n") if part.startswith("**")]
    assert len(mistakes) > 30
    assert [part.splitlines()[0] for part in mistakes if not re.search(NAMED, part)] == []


def test_a_test_that_is_not_there_is_noticed():
    assert missing_tests("`tests/layers/test_cutout.py::test_fills`") == []
    absent = [("tests/layers/test_cutout.py", "test_no_such"), ("tests/test_no_such.py", "test_a")]
    for file, name in absent:
        assert missing_tests(f"`{file}::{name}`") == [f"{file}::{name}"]


@pytest.mark.parametrize("name", hooks.PICTURES)
def test_a_picture_is_small_whole_and_the_same_every_time(name):
    state = torch.get_rng_state()
    text = hooks.picture(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks.picture(name) == text
    assert len(text) < 20_000
    root = ElementTree.fromstring(text)
    colours = {shape.get("fill") for shape in root if shape.tag.endswith("rect")}
    assert len(colours - {"none"}) >= 2  # something is dropped, something is not


def test_every_card_has_its_picture_and_every_picture_a_card():
    assert {card.stem for card in CARDS} == set(hooks.PICTURES)
    for card in CARDS:
        assert f"]({card.stem}.svg)" in card.read_text(encoding="utf-8")


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_card_says_all_of_it(card):
    text = card.read_text(encoding="utf-8")
    assert text.startswith("# ")
    for part in ("Equation", "Use it", "Cost.", "Reference.", "What differs"):
        assert f"**{part}" in text, part


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert f": {page.relative_to(DOCS).as_posix()}\n" in text


def test_the_page_on_compare_names_every_method():
    text = (DOCS / "compare.md").read_text(encoding="utf-8")
    for name in METHODS:
        assert f"\n| `{name}` |" in text
    assert set(app.DEFAULT_METHODS) <= set(METHODS)
