"""The rank-0 brain and its plain data. Nothing in this package imports torch."""
