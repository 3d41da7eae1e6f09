"""Commands that reproduce the numbers in the README."""
