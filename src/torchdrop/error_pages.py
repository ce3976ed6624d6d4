"""The pages of the documentation that errors and warnings refer to."""

from __future__ import annotations

__all__ = ["see"]

_ADDRESS = "https://torchdrop.readthedocs.io/errors/"


def see(page: str) -> str:
    """Return the end of a message that refers to ``docs/errors/<page>.md``."""
    return f". See {_ADDRESS}{page}/"
