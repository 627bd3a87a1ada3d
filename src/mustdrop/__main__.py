"""The command line: `python -m mustdrop` or `mustdrop`. The commands are in `mustdrop.cli`."""

from __future__ import annotations

from mustdrop.cli import main

if __name__ == "__main__":
    main()
