"""The report of ``check_order``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

__all__ = ["OrderFinding", "OrderReport"]


@dataclass(frozen=True)
class OrderFinding:
    """One dropout whose output reaches a BatchNorm.

    Attributes:
        dropout: The path of the dropout. For a function, the path of the module that calls it and
            its name ("head.dropout()"). For stochastic depth, the name of the branch.
        kind: The class or function: "Dropout", "DropPath", "dropout()", "stochastic depth".
        rate: Its drop probability; None if it is not known.
        batch_norm: The path of the nearest BatchNorm that its output reaches.
        forward: The path of the innermost module that contains both; empty for the model.
        distance: The number of operations from the dropout to the BatchNorm, the BatchNorm
            included: 1 if it takes the output of the dropout.
        further: The other BatchNorms that the output reaches without passing a BatchNorm, in order.
        assumed: Whether the output passes through a forward that could not be read. Its outputs are
            assumed to depend on all its inputs and on all modules in it.
    """

    dropout: str
    kind: str
    rate: float | None
    batch_norm: str
    forward: str
    distance: int
    further: tuple[str, ...] = ()
    assumed: bool = False

    def __str__(self) -> str:
        rate = "" if self.rate is None else f", {self.rate:g}"
        where = f"in {self.forward}" if self.forward else "in the model's own forward"
        text = f"{self.dropout} ({self.kind}{rate}) stands before {self.batch_norm}: {where}, "
        text += f"{self.distance} operation{'s' if self.distance != 1 else ''} on"
        if self.further:
            text += f"; and before {len(self.further)} more"
        return text + (" (assumed)" if self.assumed else "")


class OrderReport(Sequence[OrderFinding]):
    """The result of :func:`check_order`: a sequence of findings, empty if there are none.

    Attributes:
        findings: One for each dropout before a BatchNorm, in the order of the forward pass.
        unreadable: Why the forwards of other modules could not be read, by their paths. The order
            of the modules in them is not known.
    """

    def __init__(
        self, model: str, findings: list[OrderFinding], unreadable: dict[str, str], norms: int
    ) -> None:
        self.findings = findings
        self.unreadable = unreadable
        self._model = model
        self._norms = norms

    def __len__(self) -> int:
        return len(self.findings)

    @overload
    def __getitem__(self, key: int) -> OrderFinding: ...

    @overload
    def __getitem__(self, key: slice) -> list[OrderFinding]: ...

    def __getitem__(self, key: int | slice) -> OrderFinding | list[OrderFinding]:
        return self.findings[key]

    def __repr__(self) -> str:
        count = len(self.findings)
        title = f"order in {self._model}: "
        if count:
            title += f"{count} dropout{'s' if count != 1 else ''} before a BatchNorm"
        elif not self._norms:
            title += "no BatchNorm"
        else:
            title += "no dropout before a BatchNorm" + (" was seen" if self.unreadable else "")
        lines = [title, *(f"  {finding}" for finding in self.findings)]
        for name, why in self.unreadable.items():
            lines.append(f"  not read: {name or 'the model'}: {why}")
        return "\n".join(lines)
