"""The checkpoints of trials: their files, who writes and uploads them, and which are kept."""
