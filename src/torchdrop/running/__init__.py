"""The objects in the ``forward`` slots of blocks, and the generated forwards they run."""
