"""Stochastic depth in training loops of other libraries; each file needs its library."""
