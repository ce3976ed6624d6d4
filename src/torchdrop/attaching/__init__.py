"""Add stochastic depth to a model and remove it. The only package that changes a model."""
