"""What the verbs of `hpo.run` share, and the verbs for whole studies."""
