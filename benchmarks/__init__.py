"""Each claim in the README, as a command."""
