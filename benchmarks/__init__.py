"""Commands that reproduce the numbers in benchmarks/README.md."""
