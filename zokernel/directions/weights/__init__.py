"""Weights that directions move: how they are restored, and how perturbed copies of them are made."""
