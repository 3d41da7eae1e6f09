"""Work on whole studies and their files: list, copy, rename, delete, and clean what nothing needs."""
