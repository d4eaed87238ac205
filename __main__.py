"""``python -m edgestill``."""

from .cli import main

main()
