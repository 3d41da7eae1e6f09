"""From a YAML file to a frozen, validated Space."""
