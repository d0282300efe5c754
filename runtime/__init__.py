"""What every rank executes: model, heads, KV cache, the step and the engine loop."""
