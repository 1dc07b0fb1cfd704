"""The averaged iterate of a run: what moved the weights, its weights in the average, and how it is stored."""
