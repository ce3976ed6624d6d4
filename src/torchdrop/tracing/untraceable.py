"""The errors that say why a forward cannot be traced."""

from __future__ import annotations

__all__ = ["DataDependentError", "UntraceableError"]


class UntraceableError(Exception):
    """The forward of a block cannot be traced, for example because it sets an attribute."""


class DataDependentError(UntraceableError):
    """The forward of a block branches on data, so on fewer rows it may take another path."""
