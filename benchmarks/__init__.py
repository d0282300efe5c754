"""Side-by-side measurements. Every script prints a table for people and, last, one JSON line for machines."""
