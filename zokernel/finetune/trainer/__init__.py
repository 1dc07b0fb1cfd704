"""The training loop: transformers' ``Trainer`` with a zeroth-order step."""
