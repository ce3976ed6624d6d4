"""Report that a private PyTorch API is missing, with an error or a warning."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch

__all__ = ["import_error", "required", "warn_once"]


def import_error(what: object) -> ImportError:
    """Return the error to raise if torchdrop cannot work without ``what``."""
    return ImportError(
        f"torchdrop uses a private API that PyTorch {torch.__version__} does not have ({what}); "
        f"install a newer torchdrop, or an older PyTorch"
    )


def required(path: str) -> Any:
    """Return the object at the dotted ``path`` in torch.

    Raises:
        ImportError: PyTorch does not have it.
    """
    found: Any = torch
    for name in path.split(".")[1:]:
        if not hasattr(found, name):
            raise import_error(path)
        found = getattr(found, name)
    return found


@cache
def warn_once(api: str, consequence: str) -> None:
    """Warn that ``api`` is missing, and say what the consequence is."""
    warnings.warn(
        f"PyTorch {torch.__version__} does not have {api}, or it behaves differently: "
        f"{consequence}; install a newer torchdrop, or an older PyTorch",
        RuntimeWarning,
        stacklevel=3,
    )
