"""Tell which residual sums form a stack of blocks, and so are taken by default."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from torchdrop.finding.residual_sums import ResidualSums
from torchdrop.finding.split import ResidualSum

__all__ = ["count_calls", "module_of", "reasons_not_taken"]


def count_calls(model: nn.Module, finders: Iterable[ResidualSums]) -> Counter[nn.Module]:
    """Return how often each module is called in one forward pass, as far as graphs show it."""
    # A module that no graph calls counts once for each of its paths.
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


def reasons_not_taken(
    finders: dict[str, ResidualSums], uses: Counter[nn.Module]
) -> dict[ResidualSum, str]:
    """Return for each residual sum why it is not taken by default; empty if it is taken.

    The blocks of a residual stack are repeated: as modules of one class, as modules of different
    classes at similar paths ("layer1.0" and "layer2.0"), or one after the other in one forward. A
    sum that is not repeated is left out, with one exception: one whose shortcut is the identity is
    taken if its block is in a list and other blocks of the same class exist. For example, most
    blocks of a list may have a stride and add nothing, and a single block adds its input. If sums
    of one forward are nested, the outermost ones that are repeated are taken.

    Args:
        finders: The residual sums of each forward, by the path of its module.
        uses: How often each module is called.
    """
    why_not = {entry: entry.why_not for finder in finders.values() for entry in finder.entries}
    # A sum is repeated if another one has a key in common with it.
    keys: dict[ResidualSum, list[object]] = {}
    may_be_single: set[ResidualSum] = set()
    kinds = Counter(type(finder.owner) for finder in finders.values())
    for name, finder in finders.items():
        for entry in finder.entries:
            module, element = module_of(finder, entry)
            # Elements of a list count as repeated only within the forward that loops over it.
            keys[entry] = [(name, type(module)) if element else type(module)]
            path_pattern = re.sub(r"\d+", "#", name)
            if element is None and "#" in path_pattern:
                keys[entry].append(path_pattern)
                if kinds[type(finder.owner)] > 1 and entry.shortcut == "identity":
                    may_be_single.add(entry)
    # Repeat until no sum is left out: without one, a sum inside it may become the outermost.
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
        repeats: Counter[object] = Counter()
        for entry, finder in outermost.items():
            repeats.update(dict.fromkeys(keys[entry], uses[finder.owner]))
        lone = [
            entry
            for entry in outermost
            if entry not in may_be_single and all(repeats[key] < 2 for key in keys[entry])
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
    """Return the module that a sum belongs to, and its path if it is an element of a list."""
    element = finder.elements[entry]
    return (finder.owner.get_submodule(element) if element else finder.owner), element
