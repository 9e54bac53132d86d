"""``python -m ckptmgr``: the command line."""

from __future__ import annotations

from ckptmgr.cli.main import main

if __name__ == "__main__":
    main()
