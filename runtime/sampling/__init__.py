"""From logits to tokens: processors, filters, drawing, acceptance, log-probabilities."""
