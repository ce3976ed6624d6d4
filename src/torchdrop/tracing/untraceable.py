"""The errors of a forward that cannot be read."""

from __future__ import annotations

__all__ = ["DataDependentError", "UntraceableError"]


class UntraceableError(Exception):
    """The forward of a block cannot be read: it sets an attribute, say."""


class DataDependentError(UntraceableError):
    """The forward of a block branches on data: on fewer rows it might do something else."""
