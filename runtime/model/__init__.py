"""The decoder and the Medusa heads, their configuration and their weights."""
