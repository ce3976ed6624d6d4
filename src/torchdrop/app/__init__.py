"""The command line. Nothing here is imported by ``import torchdrop``."""
