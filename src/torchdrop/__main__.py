"""The command line as ``python -m torchdrop``, for where the script is not on the path."""

from __future__ import annotations

import sys

from torchdrop.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
