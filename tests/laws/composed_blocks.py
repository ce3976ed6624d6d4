"""A Hypothesis strategy of models made of the constructs that people use in their blocks.

``specs()`` draws a :class:`Spec`; ``text_of`` writes the module of a model with two such blocks,
and ``build`` executes it, so that the forwards are ordinary Python with a source. The same text
holds the reference: each branch as a function of its own, and ``by_hand``, which leaves it to the
caller how a branch is added. Nothing in it knows torchdrop.
"""

from __future__ import annotations

import itertools
import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from string import Template
from textwrap import indent
from types import ModuleType
from typing import Any

from composed_constructs import CONTEXTS, CORES, EXTRAS, MIXING, SUMS, Construct, Sum
from hypothesis import strategies as st

PIECES: dict[str, Construct] = {**CORES, **EXTRAS, **MIXING}
SIDES = ("mask", "bias", "position", "cond", "factor", "index")
ROWS_OF_SAMPLES = ("mask", "bias", "index")  # "cond" and "position" may have one row for all
FORMS = (
    "tensor", "keywords", "tuple in and out", "dict in and out", "dict written into",
    "None beside", "mean beside",
)  # fmt: skip
CHECKPOINTS = ("", "checkpointed blocks", "reentrantly checkpointed blocks")
MODES = ("", "under autocast", "a call without grad", "added without grad")


@dataclass(frozen=True)
class BranchSpec:
    """The pieces of a branch, each with the context around it (or ""), and how it is added."""

    pieces: tuple[tuple[str, str], ...]
    sum: str


@dataclass(frozen=True)
class Spec:
    """A model: two blocks of the same class.

    dims, width, length: the shape of the stream: (batch, width) or (batch, length, width).
    batches: the batch sizes of the example and of two training steps.
    layout: "in a row", or "in parallel" for two branches of the same input.
    style: whether the branches stand in the forward, or are methods of the block.
    mode: one of ``MODES``.
    off: whether the second block is switched off in the second step.
    changing: whether the optional tensor, the number and the setting differ in the second step,
        and the position table gets a row for each sample.
    """

    branches: tuple[BranchSpec, ...]
    dims: int = 2
    width: int = 4
    length: int = 3
    batches: tuple[int, int, int] = (2, 4, 5)
    p: float = 0.5
    sampling: str = "exact"
    layout: str = "in a row"
    style: str = "inline"
    form: str = "tensor"
    checkpoints: str = ""
    mode: str = ""
    off: bool = False
    changing: bool = False

    def pieces(self) -> Iterator[Construct]:
        return (PIECES[name] for branch in self.branches for name, _ in branch.pieces)

    def sides(self) -> list[str]:
        needed = {piece.side for piece in self.pieces()}
        return [side for side in SIDES if side in needed]

    def per_rows(self, k: int) -> bool:
        return any(PIECES[name].per_rows for name, _ in self.branches[k].pieces)

    def mixes(self, k: int) -> bool:
        return any(name in MIXING for name, _ in self.branches[k].pieces)

    def constructs(self) -> list[str]:
        """Return the names of all constructs in it, by which the figures are counted."""
        found = [name for branch in self.branches for name, _ in branch.pieces]
        found += [context for branch in self.branches for _, context in branch.pieces if context]
        found += [branch.sum for branch in self.branches if self.layout == "in a row"]
        found += [f"{len(self.branches)} branches {self.layout}"] * (len(self.branches) > 1)
        found += [f"form: {self.form}", self.checkpoints, self.mode]
        found += ["branches as methods"] * (self.style == "method")
        found += ["switched off later"] * self.off
        found += ["arguments that change"] * (self.changing and bool(self.sides()))
        return sorted({name for name in found if name})


# ---------------------------------------------------------------------------------------------
# The strategy


def _piece(names: list[str]) -> st.SearchStrategy[tuple[str, str]]:
    contexts = st.sampled_from([""] * 3 * len(CONTEXTS) + list(CONTEXTS))
    return st.tuples(st.sampled_from(names), contexts)


@st.composite
def _branches(draw: st.DrawFn, dims: int, mixing: list[str]) -> BranchSpec:
    def legal(table: dict[str, Construct]) -> list[str]:
        some = [name for name, piece in table.items() if dims in piece.dims]
        # A third of the models have two dimensions: what needs that is drawn twice as often.
        return some + [name for name in some if table[name].dims == (2,)]

    extras = _piece(legal(EXTRAS))
    pieces = draw(st.lists(extras, max_size=2))
    pieces.append(draw(_piece(legal(CORES))))
    pieces += draw(st.lists(extras, max_size=2))
    if mixing:
        place = draw(st.integers(0, len(pieces)))
        pieces[place:place] = [(name, "") for name in mixing]
    return BranchSpec(tuple(pieces), draw(st.sampled_from(list(SUMS))))


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Draw a model; in a fifth of them rows of one branch depend on each other."""
    dims = draw(st.sampled_from([2, 3, 3]))
    count = draw(st.sampled_from([1, 1, 1, 2, 2, 2, 3]))
    mixing: list[str] = []
    if draw(st.sampled_from([False] * 4 + [True])):
        mixing = draw(st.lists(st.sampled_from(list(MIXING)), min_size=1, max_size=3, unique=True))
    which = draw(st.integers(0, count - 1)) if mixing else -1
    branches = tuple(draw(_branches(dims, mixing if k == which else [])) for k in range(count))
    layout = draw(st.sampled_from(["in a row", "in a row", "in parallel"])) if count == 2 else ""
    batches = draw(st.lists(st.integers(4, 8), min_size=2, max_size=2, unique=True))
    form = draw(st.sampled_from(FORMS[:1] * 4 + FORMS[1:]))
    spec = Spec(
        branches=branches,
        dims=dims,
        width=draw(st.sampled_from([4, 6, 8])),
        length=draw(st.sampled_from([3, 4, 5])),
        batches=(draw(st.sampled_from([2, 3, batches[0]])), *batches),
        p=draw(st.sampled_from([0.5, 0.5, 0.25, 0.75])),
        sampling=draw(st.sampled_from(["exact", "exact", "independent"])),
        layout=layout or "in a row",
        style=draw(st.sampled_from(["inline", "inline", "method"])),
        form=form,
        checkpoints=draw(st.sampled_from(CHECKPOINTS[:1] * 6 + CHECKPOINTS)),
        mode=draw(st.sampled_from(MODES[:1] * 8 + MODES)),
        off=draw(st.sampled_from([False] * 9 + [True])),
        changing=draw(st.booleans()),
    )
    if any(spec.per_rows(k) for k in range(count)):
        # Never a lone row, with which BatchNorm computes a second one that is drawn at random.
        spec = replace(spec, p=0.5, sampling="exact")
    asks = any(name == "grad mode asked" for branch in branches for name, _ in branch.pieces)
    if spec.form not in ("tensor", "keywords") or (asks and spec.checkpoints.startswith("re")):
        # A reentrant checkpoint runs its first forward without grad, and the second one with it.
        spec = replace(spec, checkpoints="")
    return spec


# ---------------------------------------------------------------------------------------------
# The text

HEADER = """\
from functools import lru_cache
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
"""


def text_of(spec: Spec) -> str:
    """Return the text of the module: Block and Net, then the reference."""
    return HEADER + _model(spec) + "\n# The reference\n" + _reference(spec)


def _model(spec: Spec) -> str:
    """Return the classes Block and Net."""
    out, init, methods = "", "super().__init__()\nself.off = False\n", ""
    for k, branch in enumerate(spec.branches):
        for key, piece in _named(k, branch):
            out += _fill(piece.above, key, spec)
            init += _fill(piece.init, key, spec)
            methods += _fill(piece.method, key, spec)
        init += _fill(SUMS[branch.sum].init, str(k), spec)
    sides = "".join(f", {side}" for side in spec.sides())
    if spec.style == "method":
        for k, branch in enumerate(spec.branches):
            body = _branch(spec, k, branch) + "return h\n"
            methods += f"def part_{k}(self, x{sides}):\n{indent(body, '    ')}"
    forward, opening = _forward(spec), _opening(spec)
    out += (
        f"\nclass Block(nn.Module):\n    def __init__(self):\n{indent(init, ' ' * 8)}"
        f"{indent(methods, '    ')}"
        f"    def forward(self, {opening[0]}):\n{indent(opening[1] + forward, ' ' * 8)}"
    )
    return out + _net(spec)


def _named(k: int, branch: BranchSpec) -> Iterator[tuple[str, Construct]]:
    """Yield the pieces of branch ``k``, each with the ending of its names."""
    for i, (name, _) in enumerate(branch.pieces):
        yield f"{k}_{i}", PIECES[name]


def _fill(text: str, key: str, spec: Spec) -> str:
    """Return ``text`` with its names and sizes, and an end of line."""
    sizes = {"W": spec.width, "H": spec.width // 2, "T": spec.length, "k": key}
    return Template(text).substitute(sizes) + "\n" if text else ""


def _branch(spec: Spec, k: int, branch: BranchSpec) -> str:
    """Return the statements that compute ``h``, the value of branch ``k``, from ``x``."""
    form = _sum(spec, branch)
    out = f"h = {form.start}\n"
    for (key, piece), (_, context) in zip(_named(k, branch), branch.pieces, strict=True):
        body = _fill(piece.body, key, spec)
        out += f"with {CONTEXTS[context]}:\n{indent(body, '    ')}" if context else body
    return out


def _sum(spec: Spec, branch: BranchSpec) -> Sum:
    return SUMS[branch.sum] if spec.layout == "in a row" else SUMS["x + h"]


def _forward(spec: Spec) -> str:
    """Return the statements of the forward of the block, behind those that find ``x``."""
    sides = "".join(f", {side}" for side in spec.sides())
    out = f"if self.off:\n    return {_result(spec)}\n" if spec.off else ""
    for k, branch in enumerate(spec.branches):
        form = _sum(spec, branch)
        out += _fill(form.before, str(k), spec)
        if spec.style == "method":
            out += f"h = self.part_{k}(x{sides})\n"
        else:
            out += _branch(spec, k, branch)
        if spec.layout == "in parallel":
            out += f"h{k} = h\n"
        else:
            out += _fill(form.body, str(k), spec)
    if spec.layout == "in parallel":
        out += "x = x + h0 + h1\n"
    return out + f"return {_result(spec)}\n"


def _opening(spec: Spec) -> tuple[str, str]:
    """Return the parameters of the forward of the block, and the statements that unpack them."""
    names = ["x", *spec.sides()]
    if spec.form == "tuple in and out":
        return "state", f"({', '.join(names)},) = state\n"
    if spec.form.startswith("dict"):
        return "state", "".join(f"{name} = state[{name!r}]\n" for name in names)
    return ", ".join(f"{n}=None" if n == "cond" else n for n in _optional_last(names)), ""


def _optional_last(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: name == "cond")


def _result(spec: Spec) -> str:
    return {
        "tuple in and out": f"({', '.join(['x', *spec.sides()])},)",
        "dict in and out": "{**state, 'x': x}",
        "dict written into": "state.update(x=x) or state",
        "None beside": "x, None",
        "mean beside": "x, x.mean(-1)",
    }.get(spec.form, "x")


def _call(spec: Spec, block: str) -> str:
    """Return a statement that calls a block, after which ``x`` is the stream."""
    sides = spec.sides()
    if spec.form == "tuple in and out":
        return f"x = {block}(({', '.join(['x', *sides])},))[0]\n"
    if spec.form.startswith("dict"):
        entries = ", ".join(f"{name!r}: {name}" for name in ["x", *sides])
        return f"x = {block}({{{entries}}})['x']\n"
    if spec.form == "keywords":
        given = ", ".join(["x", *(f"{side}={side}" for side in sides)])
    else:
        given = ", ".join(_optional_last(["x", *sides]))
    if spec.checkpoints:
        reentrant = spec.checkpoints.startswith("re")
        if reentrant:  # which takes no keywords
            given = ", ".join(_optional_last(["x", *sides]))
        return f"x = checkpoint({block}, {given}, use_reentrant={reentrant})\n"
    beside = {"None beside": "x, _ = ", "mean beside": "x, mean = "}.get(spec.form, "x = ")
    return f"{beside}{block}({given})\n"


def _net(spec: Spec) -> str:
    parameters = ", ".join(["self", "x", *spec.sides()])
    body = "x = x * 1.0\ntotal = 0.0\nfor block in self.blocks:\n"
    body += indent(_call(spec, "block"), "    ")
    if spec.form == "mean beside":
        body += "    total = total + mean\n"
    body += "return x, total\n" if spec.form == "mean beside" else "return x\n"
    return (
        "\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.blocks = nn.ModuleList(Block() for _ in range(2))\n"
        f"    def forward({parameters}):\n{indent(body, ' ' * 8)}"
    )


def _reference(spec: Spec) -> str:
    """Return the functions of the branches, the block by hand, and the call of a block."""
    names = ["x", *spec.sides()]
    out = ""
    for k, branch in enumerate(spec.branches):
        body = _branch(spec, k, branch)
        body += "return " + _fill(_sum(spec, branch).branch, str(k), spec)
        out += f"\ndef branch_{k}({', '.join(['self', *names])}):\n{indent(body, '    ')}"
    body = "if self.off:\n    return x\n"
    if spec.layout == "in parallel":
        body += "stream = x\n"
    for k, branch in enumerate(spec.branches):
        form = _sum(spec, branch)
        body += _fill(form.before, str(k), spec)
        skip = _fill(form.skip, str(k), spec).strip()
        given = names if spec.layout == "in a row" else ["stream", *names[1:]]
        body += f"x = add({k}, {skip}, branch_{k}, ({', '.join(given)},))\n"
        body += _fill(form.after, str(k), spec)
    body += "return x\n"
    out += f"\ndef by_hand({', '.join(['self', *names, 'add'])}):\n{indent(body, '    ')}"
    plain = replace(spec, checkpoints="")
    body = "x = x * 1.0\n" + _call(plain, "self") + "return x\n"
    return out + f"\ndef whole({', '.join(['self', *names])}):\n{indent(body, '    ')}"


_numbers = itertools.count()


@contextmanager
def built(spec: Spec) -> Iterator[Any]:
    """Execute the text of ``spec`` as a module of its own, whose source can be read."""
    name, text = f"composed_{next(_numbers)}", text_of(spec)
    file = f"<{name}>"
    module = ModuleType(name)
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    sys.modules[name] = module
    try:
        exec(compile(text, file, "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[name], linecache.cache[file]
