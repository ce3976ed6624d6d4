"""Imports go one way, and `import torchdrop` imports torch and nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchdrop

ROOT = Path(torchdrop.__file__).parent

# From the bottom up: a file may import from lines above its own, and from its own.
ORDER = [
    {"schedules", "checks"},
    {"rows"},
    {"layers"},
    {"functional"},
    {"cost"},
    {"tracing"},
    {"finding"},
    {"rewrite"},
    {"state", "slot"},
    {"keeper", "site", "whole", "attach", "plan"},
    {"diagnostics"},
    {"integrations", "app"},
    {"__main__"},
]


def level(name):
    """The place of a module in ORDER; of its package where it is not named itself."""
    while name:
        for place, names in enumerate(ORDER):
            if name in names:
                return place
        name = name.rpartition(".")[0]
    return None


def imported(path, name, root):
    """(module, line) for each module of the package that a file imports, wherever it does."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ["torchdrop", *filter(None, package.split("."))]
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, *filter(None, [node.module])])
            # `from torchdrop import rows` names a module, `from torchdrop.rows import take` not.
            targets = [f"{base}.{a.name}" for a in node.names]
        else:
            continue
        for target in targets:
            first, _, rest = target.partition(".")
            if first != "torchdrop":
                continue
            while rest and not (
                (root / f"{rest.replace('.', '/')}.py").exists()
                or (root / rest.replace(".", "/")).is_dir()
            ):
                rest = rest.rpartition(".")[0]
            yield rest, node.lineno


def wrong_way(root):
    """Each import that goes up, and each file that has no place in the order."""
    found = []
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__")
        name = name.rstrip(".")
        if not name:
            continue  # the root exports from everywhere
        own = level(name)
        if own is None:
            found.append(f"{name} has no place in the order")
            continue
        for target, line in imported(path, name, root):
            # The root is above all but those who are its users.
            if (len(ORDER) - 2 if not target else level(target)) > own:
                found.append(f"{name}:{line} imports {target or 'the root'}")
    return found


def test_imports_go_one_way():
    assert wrong_way(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("rows.py", "from torchdrop.layers import DropPath", "rows:1 imports layers"),
        ("rows.py", "from torchdrop import layers", "rows:1 imports layers"),
        ("rows.py", "import torchdrop.layers as x", "rows:1 imports layers"),
        ("rows.py", "from . import layers", "rows:1 imports layers"),
        ("rows.py", "from .layers import DropPath", "rows:1 imports layers"),
        ("rows.py", "def f():\n    from torchdrop import layers", "rows:2 imports layers"),
        ("rows.py", "import torchdrop", "rows:1 imports the root"),
        ("layers.py", "from torchdrop.app.cli import main", "layers:1 imports app.cli"),
        ("integrations/hf.py", "from ..attach import x\nfrom .. import Plan", None),
        ("utils.py", "", "utils has no place in the order"),
    ],
)
def test_the_order_can_be_broken(tmp_path, file, source, complaint):
    for name in (
        "rows.py",
        "layers.py",
        "attach.py",
        "cost.py",
        "app/cli.py",
        "integrations/hf.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("import torch\n")
    assert wrong_way(tmp_path) == []
    (tmp_path / file).write_text(source)
    assert wrong_way(tmp_path) == ([complaint] if complaint else [])


def foreign_after(statement):
    """What an import brings in beyond what `import torch` alone brings in."""
    code = (
        "import sys, torch; import torch.fx, torch.utils.flop_counter; before = set(sys.modules)\n"
        f"{statement}\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "own = {'torch', 'torchdrop'} | set(sys.stdlib_module_names)\n"
        "print(*sorted(new - own))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.split()


def test_import_torchdrop_imports_torch_and_nothing_else():
    statement = f"sys.path.insert(0, {str(ROOT.parent)!r}); import torchdrop"
    assert foreign_after(statement) == []


def test_the_import_contract_can_be_broken(tmp_path):
    (tmp_path / "heavy_peer.py").write_text("")
    (tmp_path / "bad_package.py").write_text("import heavy_peer")
    assert foreign_after(f"sys.path.insert(0, {str(tmp_path)!r}); import bad_package") == [
        "bad_package",
        "heavy_peer",
    ]
