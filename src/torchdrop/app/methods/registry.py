"""The registry of the methods that ``torchdrop compare`` compares.

To add a method, write a function that applies it to a network, in the file of the place where it
acts (a layer, the output of a block, the batch, ...), and register it below that function with a
one-line summary and a default ``p`` (how the present defaults were measured:
docs/development/design-notes.md). The command line, its help and the tables read the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from torchdrop.schedules import check_rate

from ..errors import UserError

__all__ = ["METHODS", "NONE", "Applied", "Method", "default_methods", "rates", "register"]


class Applied:
    """A method applied to one network, as training sees it.

    The base class is the method that changes nothing.
    """

    asked: float | None = None
    """The mean drop rate that was asked for; None where the method drops nothing."""

    @property
    def reached(self) -> bool:
        """Whether the forward of the network has called a module that the method acts on."""
        return True

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch to train on, given the one that was loaded. Called in training only."""
        return images, labels

    def observed(self) -> float | None:
        """Return the drop rate that training delivered since the last call, if anything did."""
        return None


Build = Callable[[nn.Module, float], Applied]


@dataclass(frozen=True)
class Method:
    """A way to regularise a network.

    Attributes:
        name: The name on the command line.
        summary: One line on what the method does.
        build: A function of a network and ``p`` that applies the method to the network, in place.
        p: The default of ``p``. None where the method has no ``p``, or takes it from another
            method (``costs_like``).
        rate: Whether ``p`` is a probability, which a ``--p`` for all methods sets. Otherwise
            ``p`` is another number in [0, 1], which only a ``--p`` for this method sets.
        costs_like: The name of the method whose FLOPs this one has to match. Its ``p`` is then
            measured, as 1 - FLOPs of that method / FLOPs of ``none``, unless it is given by name.
        default: Whether the method is compared when none is asked for by name.
    """

    name: str
    summary: str
    build: Build
    p: float | None = None
    rate: bool = True
    costs_like: str | None = None
    default: bool = False


METHODS: dict[str, Method] = {}
"""All methods, in the order of the table: those of the default comparison come first."""


def register(method: Method) -> None:
    """Add a method to :data:`METHODS`.

    Raises:
        ValueError: A method of that name is registered already.
    """
    if method.name in METHODS:
        raise ValueError(f"there is a method {method.name!r} already; choose another name")
    METHODS[method.name] = method
    # The sort is stable: within each group the methods keep the order of their registration.
    in_order = sorted(METHODS.items(), key=lambda item: not item[1].default)
    METHODS.clear()
    METHODS.update(in_order)


def default_methods() -> tuple[str, ...]:
    """Return the names of the methods that are compared when none is asked for by name."""
    return tuple(name for name, method in METHODS.items() if method.default)


NONE = "none"
"""The name of the network as it is, which every cost is divided by."""

register(Method(NONE, "the network as it is", lambda model, p: Applied(), default=True))


def rates(
    methods: Sequence[str], given: Sequence[str], defaults: Mapping[str, float] | None = None
) -> dict[str, float | None]:
    """Return the ``p`` of each method: what was given for it, else for all, else its default.

    Args:
        methods: Names of methods.
        given: The values of ``--p``: ``"0.3"`` for all methods, ``"dropout=0.3"`` for one.
        defaults: Defaults by method that replace those of the registry.

    Returns:
        ``p`` by method; None where the method has none, or where it is measured later.

    Raises:
        UserError: An entry names a method that is not compared, or its number is not in [0, 1].
    """
    for_all: float | None = None
    for_one: dict[str, float] = {}
    for entry in given:
        name, equals, number = entry.rpartition("=")
        if equals and name not in methods:
            raise UserError(
                f"--p {entry}: {name!r} is not among the methods compared: {', '.join(methods)}"
            )
        if equals and name == NONE:
            raise UserError(f"--p {entry}: the method {NONE!r} has no p; leave this --p out")
        try:
            p = check_rate(float(number), "p")
        except ValueError as error:
            raise UserError(
                f"--p {entry}: p has to be a number between 0 and 1, "
                f"as in --p 0.3 or --p dropout=0.3"
            ) from error
        if equals:
            for_one[name] = p
        else:
            for_all = p
    result: dict[str, float | None] = {}
    for name in methods:
        default = (defaults or {}).get(name, METHODS[name].p)
        if default is not None and for_all is not None and METHODS[name].rate:
            default = for_all
        result[name] = for_one.get(name, default)
    return result
