"""optuna-dashboard behind authentication, with training curves, notes and artifacts."""
