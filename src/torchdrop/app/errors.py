"""The error that the command line shows to its user as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "one_line", "value_errors_for_user"]


class UserError(Exception):
    """An error that the user can correct. Its message is one line that says how."""


def one_line(error: object) -> str:
    """Return the message of an error as a single line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def value_errors_for_user() -> Iterator[None]:
    """Raise each ValueError of the body as a UserError, with its message as one line."""
    try:
        yield
    except ValueError as error:
        raise UserError(one_line(error)) from error
