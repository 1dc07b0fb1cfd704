"""Rewards: functions of what a model writes, and the texts of a whole population of perturbed models."""
