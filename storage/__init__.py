"""The SQL database that holds every result: Optuna's tables, and beside them our own with the prefix hpo_."""
