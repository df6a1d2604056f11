"""``python -m vramplan.cli``."""

from vramplan.cli import main

main()
