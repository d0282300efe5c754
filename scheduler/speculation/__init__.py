"""Proposes draft tokens, estimates their acceptance probabilities, and chooses how many a step verifies."""
