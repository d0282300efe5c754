"""The only package that knows ranks: the group, its collectives, sharded layers and reductions over the vocabulary."""
