"""The README's code runs, and prints what the README says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

torchvision = pytest.importorskip("torchvision")

ROOT = Path(__file__).parent.parent
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


def test_no_link_leads_nowhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
