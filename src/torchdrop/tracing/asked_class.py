"""Detect whether Python code asks for a class with ``isinstance`` or a class pattern.

A proxy takes the place of a tensor while a forward is traced, so ``isinstance(proxy, Tensor)`` has
to be true. Functions written in C read the class, too: for them a proxy must not be a Tensor,
because they would go on to read the memory of one.
"""

from __future__ import annotations

import dis
from functools import lru_cache
from types import CodeType, FrameType

__all__ = ["asked_by_isinstance"]


def asked_by_isinstance(frame: FrameType) -> bool:
    """Whether ``frame`` runs ``isinstance(...)`` or a class pattern at this moment."""
    return frame.f_lasti in _places_that_ask(frame.f_code)


@lru_cache(maxsize=4096)
def _places_that_ask(code: CodeType) -> frozenset[int]:
    """Return the offsets of the instructions of ``code`` that ask for the class of an object."""
    found = set()
    if "isinstance" in code.co_names:
        instructions = [i for i in dis.get_instructions(code) if i.opname != "PRECALL"]
        found = {
            call.offset
            for place, call in enumerate(instructions)
            if call.opname == "CALL" and _calls_isinstance(instructions[:place], call.arg or 0)
        }
    patterns = (i.offset for i in dis.get_instructions(code) if i.opname == "MATCH_CLASS")
    return frozenset({*found, *patterns})


def _calls_isinstance(before: list[dis.Instruction], arguments: int) -> bool:
    """Whether a call with ``arguments`` values on the stack calls ``isinstance``.

    Args:
        before: The instructions before the call.
        arguments: How many values the call takes from the stack besides the function.
    """
    missing = arguments
    for instruction in reversed(before):
        if missing == 0:
            return (instruction.opname, instruction.argval) == ("LOAD_GLOBAL", "isinstance")
        if instruction.opcode >= dis.HAVE_ARGUMENT:
            missing -= dis.stack_effect(instruction.opcode, instruction.arg)
        else:
            missing -= dis.stack_effect(instruction.opcode)
        if missing < 0:
            return False
    return False
