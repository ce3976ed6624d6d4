"""Stochastic depth that really skips the work, for any PyTorch model, in one line."""

__version__ = "0.1.0"
