"""Export of a trial's model as files that load without this project."""
