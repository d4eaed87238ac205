"""Where a worker runs: this machine (:mod:`.local`); :mod:`.client` is what all transports share."""
