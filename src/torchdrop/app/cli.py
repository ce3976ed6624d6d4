"""The ``torchdrop`` command: errors become one line, and an exit code."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from .errors import UserError, one_line

__all__ = ["main"]

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130

# What the command line needs beyond torch, and the extra that brings it.
_NEEDED = ("typer", "rich", "lightning", "torchvision", "sklearn")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: Instead of ``sys.argv[1:]``.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        return _fail(f"{missing[0]} is not installed: pip install 'torchdrop[train]'")
    from .commands import command

    try:
        code = command(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        return _fail(one_line(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK if code is None else code


def _fail(message: str) -> int:
    print(f"torchdrop: error: {message}", file=sys.stderr)
    return BAD_INPUT
