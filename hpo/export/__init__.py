"""The best model of a study as files that load without this project."""
