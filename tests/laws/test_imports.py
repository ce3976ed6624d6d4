"""Imports go one way, and `import torchdrop` imports torch and nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchdrop

ROOT = Path(torchdrop.__file__).parent

# What a part of the package may import: its own parts and those above it in this list.
ORDER = [
    "internals",
    "schedules",
    "checks",
    "cost",
    "text_table",
    "error_pages",
    "rows",
    "layers",
    "tracing",
    "finding",
    "running",
    "attaching",
    "depth",
    "diagnostics",
    "integrations",
    "app",
    "__main__",
]

# They only re-export, so that they stand outside the order: nothing below them may import them.
REEXPORTS = {"functional", ""}


def level(name):
    """The place of the part that a module belongs to; None where it has none."""
    part = name.partition(".")[0]
    return ORDER.index(part) if part in ORDER else None


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
    users = ORDER.index("integrations")
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__")
        name = name.rstrip(".")
        if name in REEXPORTS:
            continue
        own = level(name)
        if own is None:
            found.append(f"{name} has no place in the order")
            continue
        for target, line in imported(path, name, root):
            reexport = target in REEXPORTS or (target == "layers" and own != level("layers"))
            if (own < users) if reexport else level(target) > own:
                found.append(f"{name}:{line} imports {target or 'the root'}")
    return found


def test_imports_go_one_way():
    assert wrong_way(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("rows/take.py", "from torchdrop.layers.a import A", "rows.take:1 imports layers.a"),
        ("rows/take.py", "from torchdrop.layers import A", "rows.take:1 imports layers"),
        ("rows/take.py", "from torchdrop import layers", "rows.take:1 imports layers"),
        ("rows/take.py", "import torchdrop.layers.a as x", "rows.take:1 imports layers.a"),
        ("rows/take.py", "from ..layers import a", "rows.take:1 imports layers.a"),
        ("rows/take.py", "from ..layers.a import A", "rows.take:1 imports layers.a"),
        (
            "rows/take.py",
            "def f():\n    from torchdrop.layers import a",
            "rows.take:2 imports layers.a",
        ),
        ("rows/take.py", "import torchdrop", "rows.take:1 imports the root"),
        ("rows/take.py", "from torchdrop.rows import more", None),
        (
            "attaching/attach.py",
            "from torchdrop.layers import A",
            "attaching.attach:1 imports layers",
        ),
        ("attaching/attach.py", "from torchdrop.layers.a import A", None),
        (
            "attaching/attach.py",
            "from torchdrop.functional import f",
            "attaching.attach:1 imports functional",
        ),
        ("layers/a.py", "from torchdrop.app.cli import main", "layers.a:1 imports app.cli"),
        ("integrations/hf.py", "from ..attaching.attach import x\nfrom .. import Plan", None),
        ("utils.py", "", "utils has no place in the order"),
    ],
)
def test_the_order_can_be_broken(tmp_path, file, source, complaint):
    for name in (
        "rows/take.py",
        "rows/more.py",
        "layers/__init__.py",
        "layers/a.py",
        "attaching/attach.py",
        "cost.py",
        "functional.py",
        "app/cli.py",
        "integrations/hf.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("import torch\n")
    assert wrong_way(tmp_path) == []
    (tmp_path / file).write_text(source)
    assert wrong_way(tmp_path) == ([complaint] if complaint else [])


# Modules that take long to import. torchdrop imports them when they are needed.
HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "torch._subclasses.fake_tensor",
    "torch.fx",
    "torch.utils.flop_counter",
    "sympy",
    "triton",
)


def modules_after(statement):
    """The modules that a statement imports besides those that `import torch` imports."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        f"{statement}\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.split()


def foreign_after(statement):
    """The top-level packages among them that are neither torch nor part of Python."""
    own = {"torch", "torchdrop"} | set(sys.stdlib_module_names)
    return sorted({name.partition(".")[0] for name in modules_after(statement)} - own)


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


def test_import_torchdrop_imports_no_heavy_module():
    statement = f"sys.path.insert(0, {str(ROOT.parent)!r}); import torchdrop"
    after = modules_after(statement)
    assert "torchdrop.cost" in after
    assert not set(HEAVY) & set(after)


def test_the_test_of_heavy_modules_can_fail():
    statement = (
        f"sys.path.insert(0, {str(ROOT.parent)!r}); import torchdrop; torchdrop.cost.FlopCounter()"
    )
    assert "torch.utils.flop_counter" in set(HEAVY) & set(modules_after(statement))
