"""Find the residual branches of a model. Never changes anything."""
