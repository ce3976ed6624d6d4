"""Write the table of docs/recipes.md from docs/recipes.json.

Run ``make recipes`` after changing the data; --check only says whether there is something to write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- recipes -->\n", "<!-- end of recipes -->"

# EfficientNet's rule is not one of torchdrop.schedules.
EFFICIENTNET = "lambda p, depth: [p * block / depth for block in range(depth)]"


def line_of(recipe: dict[str, Any]) -> str:
    """Return the line of Python that sets the rates of a recipe."""
    schedule = recipe["schedule"]
    given = EFFICIENTNET if schedule == "efficientnet" else f'"{schedule}"'
    p = recipe["p"]
    options = [f"{p:g}"]
    if schedule != "linear":
        options.append(f"schedule={given}")
    if recipe["unit"]:
        options.append(f'unit="{recipe["unit"]}"')
    if recipe.get("more"):
        options.append(recipe["more"])
    return f"torchdrop.add_stochastic_depth(model, {', '.join(options)})"


def table(recipes: list[dict[str, Any]]) -> str:
    """Return the table, a row for each recipe."""
    lines = [
        "| model | size, task | largest p | over depth | over time | batch a device | precision "
        "| source | in torchdrop |",
        "|---|---|---:|---|---|---:|---|---|---|",
    ]
    for recipe in recipes:
        note = f"; {recipe['note']}" if recipe["note"] else ""
        depth = "p (l - 1) / L" if recipe["schedule"] == "efficientnet" else recipe["schedule"]
        over_time = f"`{recipe['over_time']}`" if recipe["over_time"] else ""
        cells = [
            recipe["model"],
            recipe["size"] + note,
            f"{recipe['p']:g}",
            depth,
            over_time,
            str(recipe["batch"] or ""),
            recipe["precision"] or "",
            recipe["source"],
            f"`{line_of(recipe)}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def written(page: str, recipes: list[dict[str, Any]]) -> str:
    """Return ``page`` with the table between its two comments."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(recipes)}\n{END}{after}"


def main() -> int:
    """Write the page, or check it; return the exit status."""
    page = DOCS / "recipes.md"
    recipes = json.loads((DOCS / "recipes.json").read_text(encoding="utf-8"))
    before = page.read_text(encoding="utf-8")
    text = written(before, recipes)
    if text == before:
        return 0
    if "--check" in sys.argv:
        print("docs/recipes.md does not have the table of docs/recipes.json; run make recipes")
        return 1
    page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
