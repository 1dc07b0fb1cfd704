"""Experiments of the KerZOO paper (2025), arXiv:2505.18886."""
