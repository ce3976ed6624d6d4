"""The one error that a user of the command line is meant to see."""

from __future__ import annotations

__all__ = ["UserError", "one_line"]


class UserError(Exception):
    """Something the user can put right. Its message is one line that says how."""


def one_line(error: object) -> str:
    """The message of an error as a single line; its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
