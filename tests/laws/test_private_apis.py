"""No file outside of the package internals uses a private PyTorch API."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import torchdrop

SOURCE = Path(torchdrop.__file__).parent

_PRIVATE = re.compile(r"_[a-zA-Z]\w*\Z")

# What the scan finds and is not a private API of PyTorch: by file, the name and why.
ALLOWED = {
    "tracing/tracer.py": {"_getframe": "sys._getframe is an API of Python"},
    "tracing/calls_of_forward.py": {"_find_and_load": "the function of Python that imports"},
    "tracing/doubles.py": {"_getframe": "sys._getframe is an API of Python"},
    "tracing/operations.py": {
        "_pad": "the name under which torch.fx records F.pad in the graph of a user's model",
        "_assert": "the name under which torch.fx records torch._assert of a user's model",
    },
    "tracing/own_forward.py": {"_old_forward": "where Accelerate keeps the forward it calls"},
    "app/table.py": {"_over_dense": "the end of the names of columns"},
}


# Attributes of PyTorch's own objects: a class of torchdrop that had an attribute of such a name
# would hide its use from the scan.
NAMES_OF_TORCH = {
    name
    for thing in (
        nn.Module(),
        torch.ones(1),
        torch.ones(1).untyped_storage(),
        fx.Graph(),
        fx.Graph().placeholder("x"),
        fx.Tracer(),
        fx.Proxy(fx.Graph().placeholder("x")),
        torch._C,
        torch._C._autograd,
        torch._C._functorch,
    )
    for name in (*dir(type(thing)), *vars(thing))
}


def names_of_torchdrop(trees: list[ast.Module]) -> set[str]:
    """The private attributes of torchdrop's own classes."""
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, ast.FunctionDef):
                        found.add(member.name)
                    found |= {n.id for n in _stored(member) if isinstance(n, ast.Name)}
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                of_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if of_own or "torchdrop" in node.attr:
                    found.add(node.attr)
    return found - NAMES_OF_TORCH


def _stored(statement: ast.stmt) -> list[ast.AST]:
    """What an assignment in the body of a class assigns to."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [node for target in targets for node in ast.walk(target)]


def private_apis(root: Path) -> list[str]:
    """Each use of a private name in the files under ``root`` that none of them defines."""
    paths = [path for path in sorted(root.rglob("*.py")) if path.parent.name != "internals"]
    trees = [ast.parse(path.read_text()) for path in paths]
    own = names_of_torchdrop(trees)
    found = []
    for path, tree in zip(paths, trees, strict=True):
        file = path.relative_to(root).as_posix()
        allowed = ALLOWED.get(file, {})
        for node in ast.walk(tree):
            found += [
                f"{file}:{node.lineno} {name}"  # type: ignore[attr-defined]
                for name in _private_names(node)
                if name.startswith("torch.") or name not in own | set(allowed)
            ]
    return found


def _private_names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        if _PRIVATE.match(node.attr):
            text = ast.unparse(node)
            yield text if text.startswith("torch.") else node.attr
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
        for name in [*str(node.module).split("."), *(alias.name for alias in node.names)]:
            if _PRIVATE.match(name):
                yield f"torch.{name}"
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if re.match(r"torch(\.\w+)*\._", alias.name):
                yield alias.name
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # getattr, __dict__
        found = re.match(r"(torch(\.\w+)*\.)?_[a-zA-Z]\w*\Z", node.value)
        yield from [node.value] if found else []


def test_no_other_file_uses_a_private_api() -> None:
    assert private_apis(SOURCE) == []


def test_each_allowed_name_is_still_used() -> None:
    for file, names in ALLOWED.items():
        used = {
            name
            for node in ast.walk(ast.parse((SOURCE / file).read_text()))
            for name in _private_names(node)
        }
        assert set(names) <= used, file


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("x = torch._C._functorch", "torch._C._functorch"),
        ("x = torch._assert", "torch._assert"),
        ("from torch._subclasses import FakeTensor", "torch._subclasses"),
        ("from torch.nn.modules.conv import _ConvNd as Conv", "torch._ConvNd"),
        ("import torch._dynamo as d", "torch._dynamo"),
        ("def f(tensor): return tensor._version", "_version"),
        ("def f(module): module._buffers['a'] = 1", "_buffers"),
        ("class A(nn.Module):\n    def f(self): return self._modules", "_modules"),
        ("x = getattr(node, '_saved_result')", "_saved_result"),
        ("x = '_replicate_for_data_parallel'", "_replicate_for_data_parallel"),
        ("x = 'torch._dynamo' in sys.modules", "torch._dynamo"),
        ("class A:\n    def f(self): self._mine = 1; return self._mine", None),
        ("def _f(): pass\ndef g(x): return x._asdict or '_ a'", "_asdict"),
        ("x = torch.nn.functional.relu(y.__dict__)", None),
        ("def _version(): pass\ndef f(tensor): return tensor._version", "_version"),
        ("class A:\n    def _buffers(self): pass\n    def f(self): self._buffers()", "_buffers"),
    ],
)
def test_the_scan_finds_private_apis(tmp_path: Path, line: str, name: str | None) -> None:
    (tmp_path / "internals").mkdir()
    (tmp_path / "internals" / "tensors.py").write_text("import torch._dynamo\n")
    (tmp_path / "file.py").write_text(f"import torch\n{line}\n")
    assert {text.split()[1] for text in private_apis(tmp_path)} >= ({name} if name else set())
    if name is None:
        assert private_apis(tmp_path) == []
