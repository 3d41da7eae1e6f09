"""Whether a search is worth its time: samplers and schedulers compared on learning curves, in simulated device time."""
