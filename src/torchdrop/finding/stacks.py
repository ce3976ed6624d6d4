"""Which residual sums form a stack of blocks, and are taken by default."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from torchdrop.finding.residual_sums import ResidualSums
from torchdrop.finding.split import ResidualSum

__all__ = ["choose", "module_of", "uses_of"]


def uses_of(model: nn.Module, finders: Iterable[ResidualSums]) -> Counter[nn.Module]:
    """How often each module is called, as far as its parents tell: layers may be shared."""
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for finder in finders:
        calls = Counter(
            finder.owner.get_submodule(str(node.target))
            for node in finder.nodes
            if node.op == "call_module"
        )
        for module, times in calls.items():
            uses[module] = max(uses[module], times)
    return uses


def choose(finders: dict[str, ResidualSums], uses: Counter[nn.Module]) -> dict[ResidualSum, str]:
    """For each residual addition why it is not taken by default, or an empty text.

    A residual stack repeats: as modules of one class, as modules of several classes in one place
    ("layer1.0" and "layer2.0"), or one after the other in one forward. A lone addition is something
    else, unless its block stands in a list and its class is there more than once: of blocks that
    stride, those that do not are residual. Where additions of one forward are nested, the outermost
    that repeat are taken.
    """
    why_not = {entry: entry.why_not for finder in finders.values() for entry in finder.entries}
    families: dict[ResidualSum, list[object]] = {}
    alone: set[ResidualSum] = set()
    kinds = Counter(type(finder.owner) for finder in finders.values())
    for name, finder in finders.items():
        for entry in finder.entries:
            module, element = module_of(finder, entry)
            families[entry] = [(name, type(module)) if element else type(module)]
            place = re.sub(r"\d+", "#", name)
            if element is None and "#" in place:
                families[entry].append(place)
                if kinds[type(finder.owner)] > 1 and entry.shortcut == "identity":
                    alone.add(entry)
    while True:
        outermost = {
            entry: finder
            for finder in finders.values()
            for entry in finder.entries
            if not why_not[entry]
            and not any(
                entry.split.add in other.split.inside
                for other in finder.entries
                if not why_not[other]
            )
        }
        sizes: Counter[object] = Counter()
        for entry, finder in outermost.items():
            sizes.update(dict.fromkeys(families[entry], uses[finder.owner]))
        lone = [
            entry
            for entry in outermost
            if entry not in alone and all(sizes[f] < 2 for f in families[entry])
        ]
        for entry in lone:
            module, _ = module_of(outermost[entry], entry)
            why_not[entry] = f"no other {type(module).__name__} has a residual"
        if not lone:
            break
    return {
        entry: why or ("" if entry in outermost else "inside another residual of its block")
        for entry, why in why_not.items()
    }


def module_of(finder: ResidualSums, entry: ResidualSum) -> tuple[nn.Module, str | None]:
    """The module that an addition belongs to: the element of a loop, or the block itself."""
    element = finder.elements[entry]
    return (finder.owner.get_submodule(element) if element else finder.owner), element
