"""Experiments of Paper A (ZO-eNTK)."""
