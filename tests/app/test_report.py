from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from torchdrop.app.methods import METHODS
from torchdrop.app.report import write_report
from torchdrop.app.results import FIGURES, Results
from torchdrop.app.table import WIDTH, cells, table


@pytest.fixture
def content(tmp_path):
    results = Results(
        tmp_path, {"model": "resnet-<20>", "data": "digits", "seeds": 2, "methods": {}}
    )
    for name, method in METHODS.items():
        results.begin(name, p=0.5, asked_p=0.2778, summary=method.summary, variance_shift=12.345)
        for seed in range(2):
            curves = {
                "train_loss": [2.0, 1.0, None, 0.3],
                "test_epoch": [2, 4],
                "test_error": [0.5, 0.25 + 0.1 * seed],
            }
            figures = {**dict.fromkeys(FIGURES, 0.1234), "test_error": 0.1 + 0.2 * seed}
            results.add(name, seed, **figures, epoch=4, seconds=1.0, curves=curves)
    results.begin("none")["seeds"][0]["observed_p"] = None
    results.save(complete=True)
    return results.content


def _text(content, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table(content))
        return console.export_text()


def test_table_is_whole_at_its_width(content):
    assert 100 <= WIDTH <= 110
    content["methods"]["cutout"]["mean"]["observed_p"] = 1.0
    content["methods"]["cutout"]["asked_p"] = 1.0
    text = _text(content, WIDTH)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "100.0 (100.0)" in text
    assert "12.35" in text or "12.34" in text
    for name in METHODS:
        assert name in text
    assert "20.00 ± 14.14" in text  # percent
    assert "12.3 (27.8)" in text


def test_table_without_seeds_to_spread_has_no_spread(content):
    for method in content["methods"].values():
        method["std"]["test_error"] = None
    assert "±" not in _text(content, 100).split("\n", 1)[1]


def test_one_seed_has_no_spread_to_speak_of(content, tmp_path):
    content["config"]["seeds"] = 1
    assert "resnet-<20> on digits, one seed" in _text(content, WIDTH)
    write_report(content, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "One seed, so that there is no standard deviation." in page
    assert "1 seeds" not in page


HOSTILE = "[red]<script>alert(1)</script>{{ 7 * 7 }}\"'&\n$\\\\frac$ \u202e[/nothing]\\[bold"


def test_hostile_names_are_text_and_nothing_else(content, tmp_path):
    """Of the model, the data and a method: rich's markup, HTML, jinja's, matplotlib's."""
    content["config"].update(model=HOSTILE, data=HOSTILE)
    entry = content["methods"].pop("cutout")
    content["methods"][HOSTILE] = {**entry, "summary": HOSTILE}
    shown = _text(content, 400)
    for part in ("[red]<script>alert(1)</script>{{ 7 * 7 }}", "[/nothing]\\[bold"):
        assert shown.count(part) == 3
    write_report(content, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    parser = _Outside()
    parser.feed(page)
    assert parser.loads == parser.open == []
    assert parser.tags.isdisjoint({"script", "red", "iframe", "object", "embed"})
    assert "49" not in re.findall(r"<h1>.*?</h1>", page, re.DOTALL)[0]
    assert page.count("&lt;script&gt;") >= 6


def test_results_of_an_older_version_have_no_shift(content):
    for method in content["methods"].values():
        del method["variance_shift"]
    assert {row[-1] for row in cells(content)} == {"-"}


class _Outside(HTMLParser):
    """Collects what a page would load, and checks that tags are closed."""

    def __init__(self):
        super().__init__()
        self.loads, self.open, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in {"src", "href", "xlink:href", "data", "srcset"} and value[0] != "#":
                self.loads.append(value)
        self.tags.add(tag)
        if tag not in {"meta", "br", "img", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_needs_nothing_else(content, tmp_path):
    write_report(content, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    parser = _Outside()
    parser.feed(page)
    assert parser.loads == []
    assert parser.open == []
    assert "@import" not in page
    assert page.count("<svg") == 2
    # text stays text in the SVG: the axes, and a line of the legend for each method
    assert page.count(">epoch</text>") == 2
    for label in ("test error %", "training loss"):
        assert page.count(f">{label}</text>") == 1
    assert page.count(">none</text>") == 2
    for name, method in METHODS.items():
        assert name in page
        assert re.sub("[&'].*", "", method.summary) in page
    assert "resnet-&lt;20&gt;" in page


def test_the_same_results_give_the_same_report(content, tmp_path):
    for name in ("a.html", "b.html"):
        write_report(content, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
