"""The error that the command line shows to its user as one line."""

from __future__ import annotations

__all__ = ["UserError", "one_line"]


class UserError(Exception):
    """An error that the user can correct. Its message is one line that says how."""


def one_line(error: object) -> str:
    """Return the message of an error as a single line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
