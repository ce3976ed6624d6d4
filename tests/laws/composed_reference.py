"""A model of composed_blocks.py with its inputs, and the same by hand: branches that are masked.

Nothing here knows torchdrop.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from composed_blocks import ROWS_OF_SAMPLES, Spec
from torch import Tensor, nn
from torch.nn import functional as F

Rows = list[int]


@dataclass
class Call:
    """One call of the model: its inputs, and what is set meanwhile."""

    x: Tensor
    sides: dict[str, Any]
    seed: int
    alpha: float = 0.8
    off: bool = False
    mode: str = ""

    def inputs(self) -> dict[str, Any]:
        return {"x": self.x, **self.sides}

    def modes(self) -> AbstractContextManager[Any]:
        if self.mode == "under autocast":
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return torch.no_grad() if self.mode == "a call without grad" else nullcontext()


def calls_of(spec: Spec, dtype: torch.dtype) -> list[Call]:
    """Return the call of the example and those of the training steps."""
    calls = []
    for step, batch in enumerate(spec.batches):
        shape = (batch, spec.width) if spec.dims == 2 else (batch, spec.length, spec.width)
        later = spec.changing and step > 0
        rows = batch if later else 1
        keep = torch.rand(batch, *[1] * (spec.dims - 1)) < 0.8
        possible = {
            "mask": keep.to(dtype),
            "bias": torch.randn(shape, dtype=dtype),
            "position": torch.randn(rows, *shape[1:], dtype=dtype),
            "cond": torch.randn(shape, dtype=dtype),
            "factor": 0.5 + 0.25 * later,
            "index": torch.randperm(batch),
        }
        if spec.changing and step == 1:
            possible["cond"] = None
        sides = {side: possible[side] for side in spec.sides()}
        call = Call(torch.randn(shape, dtype=dtype), sides, seed=1000 + step)
        call.alpha = 0.3 if later else 0.8
        call.off = spec.off and step == 2
        if spec.mode != "added without grad" and step > 0:
            call.mode = spec.mode if spec.mode == "under autocast" or step == 2 else ""
        calls.append(call)
    return calls


# ---------------------------------------------------------------------------------------------
# The model and its reference


class Subject:
    """A model of ``spec``, in a module of its own."""

    def __init__(self, spec: Spec, module: Any, dtype: torch.dtype) -> None:
        self.spec, self.module = spec, module
        self.net: nn.Module = module.Net().to(dtype).train()
        self.seed = 0
        for name, child in self.net.named_modules():
            if re.search(r"\.seed\d", name):
                # What is random in a branch is then the same in the model and in the reference.
                child.register_forward_pre_hook(self._set_seed)

    def _set_seed(self, *_: Any) -> None:
        torch.manual_seed(self.seed)

    def prepare(self, call: Call) -> dict[str, Any]:
        """Set what the call says; return its inputs, as leaves of this model."""
        self.seed = call.seed
        self.net.blocks[1].off = call.off  # type: ignore[union-attr]
        for name, value in vars(self.module).items():
            if name.startswith("SETTINGS"):
                value["alpha"] = call.alpha
        self.net.zero_grad(set_to_none=True)
        return {
            name: value.detach().clone().requires_grad_(value.is_floating_point())
            if isinstance(value, Tensor)
            else value
            for name, value in call.inputs().items()
        }


class ByHand:
    """The reference in one call: branches on all rows or on the kept ones, masked by hand."""

    def __init__(self, subject: Subject, batch: int, gain: float) -> None:
        self.subject, self.batch, self.gain = subject, batch, gain
        # By block and branch: what the plan says was done, and with which rows. Branches that are
        # not there are not dropped. The branch None is the block as a whole.
        self.dropped: dict[tuple[int, int | None], tuple[str, Rows]] = {}
        # The same of the residual of a child, by its path, where that was taken.
        self.inner: dict[str, tuple[str, Rows]] = {}

    def __call__(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        spec, module = self.subject.spec, self.subject.module
        sides = {k: v for k, v in inputs.items() if k != "x"}
        x, total = inputs["x"] * 1.0, torch.zeros(())
        for path, child in self.subject.net.named_modules():
            if "forward" in child.__dict__:
                del child.forward
            if path in self.inner:
                child.forward = self._inner_by_hand(child, *self.inner[path])
        for i, block in enumerate(self.subject.net.blocks):  # type: ignore[arg-type]
            if (i, None) in self.dropped and not block.off:
                whole = lambda *args, block=block: module.whole(block, *args) - args[0]  # noqa: E731
                x = self._add(i, None, x, whole, (x, *sides.values()))
            else:

                def add(
                    k: int, skip: Tensor, f: Any, args: Any, i: int = i, block: Any = block
                ) -> Tensor:
                    return self._add(i, k, skip, lambda *cut: f(block, *cut), args)

                x = module.by_hand(block, x, *sides.values(), add)
            if spec.form == "mean beside":
                total = total + x.mean(-1)
        return (x, total) if spec.form == "mean beside" else (x,)

    def _add(
        self, i: int, k: int | None, skip: Tensor, branch: Callable[..., Tensor], args: Any
    ) -> Tensor:
        """Return ``skip`` plus the branch in the rows that were kept."""
        if (i, k) not in self.dropped:
            return skip + branch(*args)
        numbers = range(len(self.subject.spec.branches)) if k is None else (k,)
        per_rows = any(map(self.subject.spec.per_rows, numbers))
        return self._masked(*self.dropped[i, k], per_rows, skip, branch, args)

    def _inner_by_hand(self, child: Any, action: str, rows: Rows) -> Callable[[Tensor], Tensor]:
        """Return the forward of a child "nested residual", its branch masked."""

        def forward(h: Tensor) -> Tensor:
            return child.b(self._masked(action, rows, False, h, lambda h: F.gelu(child.a(h)), (h,)))

        return forward

    def _masked(
        self,
        action: str,
        rows: Rows,
        per_rows: bool,
        skip: Tensor,
        branch: Callable[..., Tensor],
        args: Any,
    ) -> Tensor:
        if not rows and action != "mask":
            return skip * 1.0
        if len(rows) == self.batch:
            return skip + self.gain * branch(*args)
        if per_rows and action != "mask":
            names = ["x", *self.subject.spec.sides()]
            some = branch(*(self._cut(n, a, rows) for n, a in zip(names, args, strict=True)))
            out = some.new_zeros(self.batch, *some.shape[1:])
            out = out.index_copy(0, torch.tensor(rows), some)
        else:
            out = branch(*args)
            gone = [row for row in range(self.batch) if row not in rows]
            out = out.index_fill(0, torch.tensor(gone, dtype=torch.long), 0.0)
        return skip + self.gain * out

    def _cut(self, name: str, value: Any, rows: Rows) -> Any:
        if not isinstance(value, Tensor):
            return value
        per_sample = name == "x" or name in ROWS_OF_SAMPLES or value.shape[0] == self.batch
        return value[rows] if per_sample else value
