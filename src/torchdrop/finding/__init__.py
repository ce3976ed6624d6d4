"""Find the residual branches of a model. The model is not changed."""
