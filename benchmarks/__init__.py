"""Measurements and comparisons. Every script prints a Markdown table and, on the last line, one JSON object."""
