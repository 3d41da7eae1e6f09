"""What a search takes from earlier ones: results to learn from, values that stand, trials that get more epochs."""
