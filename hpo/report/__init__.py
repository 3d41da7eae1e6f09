"""What storage holds, for people: tables, pages, figures, progress."""
