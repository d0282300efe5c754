"""Other systems and the transformers oracle, beside this one."""
