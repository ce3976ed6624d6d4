"""Write the re-exports of the layers from the ``__all__`` of each file in torchdrop/layers.

``torchdrop.layers`` gets the classes and ``torchdrop.functional`` the functions, as plain imports
that type checkers and editors read. Run ``make exports`` after adding a layer; --check only says
whether there is something to write.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "torchdrop"

# Files of torchdrop/layers that support the layers; their names are not public.
SUPPORT = {"__init__", "base", "draws"}


def public_names(path: Path) -> list[str]:
    """Return the names in the ``__all__`` of a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{path.name} has to define __all__ as a list of strings")


def reexports(target: Path, names: dict[str, list[str]]) -> str:
    """Return the text of ``target``: its docstring, then one import for each file, and __all__."""
    text = target.read_text(encoding="utf-8")
    parts = [text[: text.index('"""', 3) + 3], ""]
    for module, found in sorted(names.items()):
        line = f"from torchdrop.layers.{module} import {', '.join(sorted(found))}"
        if len(line) > 100:
            listed = "".join(f"\n    {name}," for name in sorted(found))
            line = f"from torchdrop.layers.{module} import ({listed}\n)"
        parts.append(line)
    every = sorted(name for found in names.values() for name in found)
    listed = "".join(f'    "{name}",\n' for name in every)
    return "\n".join(parts) + f"\n\n__all__ = [\n{listed}]\n"


def expected(package: Path = PACKAGE) -> dict[Path, str]:
    """Return the text that each of the two re-exporting files should have."""
    classes: dict[str, list[str]] = {}
    functions: dict[str, list[str]] = {}
    for path in sorted((package / "layers").glob("*.py")):
        if path.stem in SUPPORT:
            continue
        for name in public_names(path):
            kind = classes if name[0].isupper() else functions
            kind.setdefault(path.stem, []).append(name)
    targets = {package / "layers" / "__init__.py": classes, package / "functional.py": functions}
    return {target: reexports(target, names) for target, names in targets.items()}


def out_of_date(package: Path = PACKAGE) -> list[Path]:
    """Return the re-exporting files that differ from what the layer files define."""
    return [p for p, text in expected(package).items() if p.read_text(encoding="utf-8") != text]


def main(arguments: list[str]) -> int:
    """Write the files that are out of date, or only name them with --check."""
    check, texts, stale = "--check" in arguments, expected(), out_of_date()
    for path in stale:
        name = path.relative_to(PACKAGE).as_posix()
        print(f"{name} is out of date; run `make exports`" if check else f"wrote {name}")
        if not check:
            path.write_text(texts[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
