"""Experiments of Paper B (NZK)."""
