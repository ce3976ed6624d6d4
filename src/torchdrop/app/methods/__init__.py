"""The methods that ``torchdrop compare`` compares."""

from .registry import METHODS, Applied, Method, rates, register

__all__ = ["METHODS", "Applied", "Method", "rates", "register"]
