"""Runtimes: open an artifact and run it, here or on another machine."""
