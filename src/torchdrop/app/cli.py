"""The entry point of ``torchdrop``: it turns an error into one line and an exit code."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from .errors import UserError, one_line

__all__ = ["main"]

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130

# The packages that the command line needs besides torch; the extra `train` installs them.
_NEEDED = ("typer", "rich", "filelock", "lightning", "torchvision", "sklearn")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: The arguments of the command; ``sys.argv[1:]`` if not given.

    Returns:
        0 for success, 2 for an error that the user can correct, 130 after Ctrl-C.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        return _fail(f"{missing[0]} is not installed: pip install 'torchdrop[train]'")
    try:
        from .commands import command  # inside, since it takes seconds in which Ctrl-C may come

        code = command(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        return _fail(one_line(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK if code is None else code


def _fail(message: str) -> int:
    print(f"torchdrop: error: {message}", file=sys.stderr)
    return BAD_INPUT
