"""The SQL database that holds every result: Optuna's tables, and our own with the prefix `hpo_`. See storage/README.md."""
