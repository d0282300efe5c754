"""The only package that knows ranks: the group, sharded layers and sharded vocabulary reductions."""
