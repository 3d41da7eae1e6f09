"""Hyperparameter search: a YAML search space, trials scheduled by Ray Tune, results in Optuna storage."""
