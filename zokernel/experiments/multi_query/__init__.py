"""Experiments on how to spend a fixed number of forward passes: many directions per step, or many steps."""
