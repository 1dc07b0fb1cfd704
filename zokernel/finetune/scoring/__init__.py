"""From logits to scores of options, objectives and decoded answers."""
