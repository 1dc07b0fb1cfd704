"""Experiments of the ZO-eNTK paper: Li et al. (2026), arXiv:2605.03373."""
