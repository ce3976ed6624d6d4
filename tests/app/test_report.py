from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from finished_results import as_text, finished_content

from torchdrop.app.methods import METHODS
from torchdrop.app.report import write_report
from torchdrop.app.table import WIDTH, table


@pytest.fixture
def content(tmp_path):
    return finished_content(tmp_path)


def test_one_seed_has_no_spread_to_speak_of(content, tmp_path):
    content["config"]["seeds"] = 1
    assert "resnet-<20> on digits, one seed" in as_text(table(content), WIDTH)
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
    shown = as_text(table(content), 400)
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
