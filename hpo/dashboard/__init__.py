"""optuna-dashboard behind authentication, with curves, notes and artifacts."""
