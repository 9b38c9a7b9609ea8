"""`python -m vistok` is the same as `vistok`; `accelerate launch -m vistok train ...` starts it on many devices."""

from __future__ import annotations

from vistok.cli import main

if __name__ == "__main__":
    main()
