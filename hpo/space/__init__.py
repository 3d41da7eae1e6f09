"""A search-space file in YAML becomes a frozen, validated `Space`."""
