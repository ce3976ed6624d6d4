"""The README's code runs, and prints what the README says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_imports import ORDER

torchvision = pytest.importorskip("torchvision")

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)

PARTS = {path.stem for path in (ROOT / "src" / "torchdrop").iterdir()}
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
CODE = [text for language, text in BLOCKS if language == "python"]
TEXT = [text for language, text in BLOCKS if language == "text"]


@pytest.fixture
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretrained weights that need no network: those of a fresh model of the same kind."""

    def fresh(weights: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        name = type(weights).__name__.removesuffix("_Weights").lower()
        return torchvision.models.get_model(name).state_dict()  # type: ignore[no-any-return]

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fresh)


@pytest.mark.usefixtures("_no_download")
def test_the_code_runs_and_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    exec(CODE[0], scope)
    printed = capsys.readouterr().out
    assert printed.startswith(TEXT[0]), printed
    assert "'layer4.1':" in printed.removeprefix(TEXT[0])
    for block in CODE[1:]:
        exec(block, scope)
    out = scope["Block"](8)(torch.randn(2, 8))
    assert out.shape == (2, 8)
    assert scope["model"](torch.randn(2, 3, 64, 64)).shape == (2, 1000)


def test_the_code_comes_early_and_is_short() -> None:
    before = README.index("```python")
    assert README[:before].count("\n") < 10
    assert len([line for line in CODE[0].splitlines() if line.strip()]) == 6


def test_the_commands_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub name them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def broken_links(page: Path) -> list[str]:
    """The links of a page whose file or heading does not exist."""
    broken = []
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text)
    for file, anchor in links:
        target = page.parent / file if file else page
        # when pages are built
        drawn = target.suffix == ".svg" and target.stem in {*hooks.PICTURES, *hooks.PLOTS}
        missing = not drawn and not target.exists()
        if missing or (anchor and anchor not in anchors(target)):
            broken.append(f"{page.name}: {file}#{anchor}")
    return broken


def test_no_link_leads_nowhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert {"README.md", "index.md", "cutout.md", "design-notes.md"} <= {p.name for p in pages}
    assert [link for page in pages for link in broken_links(page)] == []


def test_a_link_that_leads_nowhere_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Where\n\n## A `p`, and more\n[a](page.md#a-p-and-more) [b](#where)\n")
    assert broken_links(page) == []
    page.write_text("# Where\n[a](other.md) [b](page.md#here) [c](#there) ![d](e.svg)\n")
    assert len(broken_links(page)) == 4


# The pages that name files of the repository; the design notes name files of torch as well.
NAMING_FILES = ["README.md", "CONTRIBUTING.md", "docs/how-it-works.md", "docs/reliability.md"]


def missing_files(text: str) -> list[str]:
    """The Python files that ``text`` names in backticks and that do not exist."""
    names = re.findall(r"`([\w/]+\.py)`", text)
    roots = (ROOT, ROOT / "src" / "torchdrop")
    sources = {path.name for path in roots[1].rglob("*.py")}
    return [
        name
        for name in names
        if not any((root / name).exists() for root in roots)
        and not ("/" not in name and name in sources)
    ]


@pytest.mark.parametrize("page", NAMING_FILES)
def test_every_file_named_exists(page: str) -> None:
    assert missing_files((ROOT / page).read_text(encoding="utf-8")) == []


def test_the_map_of_the_source_names_every_part_in_the_order_of_imports() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", text.partition("## Where to find it")[2], re.MULTILINE)
    named = [name.strip("`/").removesuffix(".py") for row in rows for name in row.split(", ")]
    assert named == [part for part in ORDER if part in PARTS and part != "__main__"]
    table = re.findall(r"^\| (`.*?`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [name.strip("`/").removesuffix(".py") for name in table] == named


def test_a_file_that_does_not_exist_is_noticed() -> None:
    text = "`rows/sampling.py` `sampling.py` `tests/test_docs.py` `rows/nowhere.py` `nowhere.py`"
    assert missing_files(text) == ["rows/nowhere.py", "nowhere.py"]
