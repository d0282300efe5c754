"""Decides on rank 0 what each step computes, and defines plans and results. Nothing here imports torch."""
