"""Comparisons with other systems and with the transformers oracle."""
