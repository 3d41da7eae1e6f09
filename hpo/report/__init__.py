"""Show studies and searches: tables, pages, figures, and the progress of a run."""
