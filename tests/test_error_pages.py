"""The pages of docs/errors: their examples run, and each refusal refers to one of them."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

import torchdrop
from torchdrop.error_pages import see

ROOT = Path(__file__).parent.parent
SOURCE = Path(torchdrop.__file__).parent
PAGES = {path.stem: path for path in (ROOT / "docs" / "errors").glob("*.md")}
NAMES = sorted(set(PAGES) - {"index"})

# A comment at the end of a block: the error or warning that the block raises, as it begins.
RAISES = re.compile(r"^# (\w+(?:Error|Warning)): (.*)$", re.MULTILINE)


def blocks_of(name: str) -> list[str]:
    text = PAGES[name].read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_block(code: str, scope: dict[str, Any], page: str) -> None:
    """Run one block of a page, which has to raise what its last comment says."""
    expected = RAISES.search(code)
    if expected is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=r".*(?:nested tensors|deprecated)")
            exec(compile(code, page, "exec"), scope)
        return
    kind, text = expected.groups()
    if kind.endswith("Warning"):
        with pytest.warns(UserWarning, match=re.escape(text)) as caught:
            exec(compile(code, page, "exec"), scope)
        messages = [str(warning.message) for warning in caught]
        assert any(message.endswith(see(page)) for message in messages), messages
        return
    with pytest.raises(Exception, match=re.escape(text)) as raised:
        exec(compile(code, page, "exec"), scope)
    assert type(raised.value).__name__ == kind
    assert str(raised.value).endswith(see(page)), raised.value


@pytest.fixture
def _no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("_no_process_group")
@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("name", NAMES)
def test_the_examples_run_and_raise_what_they_say(name: str) -> None:
    torch.manual_seed(0)
    blocks = blocks_of(name)
    assert RAISES.search(blocks[0]), "the first example has to show the error"
    assert any(not RAISES.search(block) for block in blocks), "no example shows a way out"
    scope: dict[str, Any] = {"__name__": "example"}
    for block in blocks:
        run_block(block, scope, name)


@pytest.mark.parametrize(
    "code",
    [
        "1 + 1\n# ValueError: nothing",
        "raise ValueError('another text')\n# ValueError: a text",
        f"raise TypeError('a text' + {see('rates')!r})\n# ValueError: a text",
        "raise ValueError('a text without a page')\n# ValueError: a text",
        "raise ValueError('a way out that does not work')",
        "import warnings; warnings.warn('a way out that warns')",
        "1 + 1\n# UserWarning: nothing",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_example_that_does_not_do_what_it_says_is_noticed(code: str) -> None:
    with pytest.raises(BaseException):  # noqa: B017, PT011 - pytest's own failures included
        run_block(code, {}, "rates")


# --- every refusal has a page --------------------------------------------------------------------

# Errors of these functions are no refusals: they check an argument, or show a bug of torchdrop.
WITHOUT_PAGE = {
    "attaching/plan.py": {"load_state_dict"},
    "attaching/prepare.py": {"prepare_sites"},
    "attaching/refusals.py": {"check_settings"},
    "rows/saved_rows.py": {"_unpack"},
    "rows/shared_numbers.py": {"load_state_dict"},
    "running/rewrite.py": {"_copied"},
}


def errors_without_page(root: Path, folders: tuple[str, ...]) -> list[str]:
    """Each ValueError and RuntimeError that names no page: its file and function."""
    found = []
    for path in sorted(file for folder in folders for file in (root / folder).glob("*.py")):
        name = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            if function.name in WITHOUT_PAGE.get(name, set()):
                continue
            found += [
                f"{name}: {function.name}"
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("ValueError", "RuntimeError")
                and node.args
                and isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp)
                and "see(" not in ast.unparse(node)
            ]
    return found


def test_every_refusal_refers_to_a_page() -> None:
    assert errors_without_page(SOURCE, ("attaching", "running", "rows")) == []


def test_a_refusal_without_a_page_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "running").mkdir()
    file = tmp_path / "running" / "a.py"
    file.write_text("def f():\n    raise ValueError(f'no {1}' + see('rates'))\n")
    assert errors_without_page(tmp_path, ("running",)) == []
    file.write_text("def f():\n    raise ValueError(f'no {1}')\n")
    assert errors_without_page(tmp_path, ("running",)) == ["running/a.py: f"]


def test_the_pages_that_messages_refer_to_exist_and_are_all_there_are() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    named = set(re.findall(r'\bsee\("([\w-]+)"\)', text))
    assert named == set(NAMES)
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = PAGES["index"].read_text(encoding="utf-8")
    for name in NAMES:
        assert f"errors/{name}.md" in menu
        assert f"({name}.md)" in index
