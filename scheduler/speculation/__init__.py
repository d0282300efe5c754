"""Draft tokens: which are proposed, how likely each is, and how many a step verifies."""
