"""The command line as `python -m fxmpq`."""

from __future__ import annotations

from fxmpq.cli import main

if __name__ == "__main__":
    main()
