"""Experiments of the NZK paper (2026), arXiv:2603.21169."""
