"""The table of published rates: made from the data, and each line of Python sets these rates."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import torchdrop
from small_nets import net
from torchdrop.schedules import over_time

ROOT = Path(__file__).parents[1]
RECIPES: list[dict[str, Any]] = json.loads((ROOT / "docs" / "recipes.json").read_text("utf-8"))

spec = importlib.util.spec_from_file_location("recipes", ROOT / "tools" / "recipes.py")
assert spec is not None
assert spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_there_are_many_recipes_and_none_twice() -> None:
    assert len(RECIPES) >= 25
    assert len({(r["model"], r["size"]) for r in RECIPES}) == len(RECIPES)


def test_the_page_has_the_table_of_the_data() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    assert tool.written(page, RECIPES) == page
    assert tool.written(page, RECIPES[1:]) != page


def wrong_field(recipe: dict[str, Any]) -> str | None:
    """The first field of a recipe that is not legal, or None."""
    legal = {
        "model": bool(recipe["model"]),
        "size": bool(recipe["size"]),
        "p": isinstance(recipe["p"], float) and 0 < recipe["p"] < 1,
        "schedule": recipe["schedule"] in {*torchdrop.schedules.DEPTH_RULES, "efficientnet"},
        "unit": recipe["unit"] in (None, "block"),
        "batch": recipe["batch"] is None or recipe["batch"] > 0,
        "precision": recipe["precision"]
        in (None, "fp32", "fp16", "bf16", "AMP", "fp16 AMP", "bf16 AMP"),
        "source": "arXiv:" in recipe["source"],
    }
    return next((name for name, right in legal.items() if not right), None)


def name_of(recipe: dict[str, Any]) -> str:
    return f"{recipe['model']} {recipe['size']}"


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_the_line_of_a_recipe_sets_its_rates(recipe: dict[str, Any]) -> None:
    assert wrong_field(recipe) is None
    model = net(12)
    plan = eval(tool.line_of(recipe), {"torchdrop": torchdrop, "model": model})
    rates = [block.p for block in plan.blocks]
    most = recipe["p"] * (11 / 12 if recipe["schedule"] == "efficientnet" else 1)
    assert max(rates) == rates[-1] == pytest.approx(most)
    assert (rates[0] == rates[-1]) == (recipe["schedule"] == "uniform")
    if recipe["over_time"]:
        rule = eval(recipe["over_time"], vars(over_time))
        assert max(rule(t / 100) for t in range(101)) == pytest.approx(recipe["p"], abs=1e-3)
        torchdrop.apply_schedule(model, rule, 0.5)
        assert plan.blocks[-1].p == pytest.approx(rule(0.5))


@pytest.mark.parametrize("field", ["p", "schedule", "source", "batch", "unit", "precision"])
def test_a_wrong_field_is_noticed(field: str) -> None:
    wrong = {"p": 1.5, "schedule": "cos", "source": "", "batch": 0, "unit": "b", "precision": "x"}
    assert wrong_field({**RECIPES[0], field: wrong[field]}) == field
