"""The command line. ``import torchdrop`` does not import it."""
