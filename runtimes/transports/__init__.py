"""Where a worker runs: this machine, later boards and phones."""
