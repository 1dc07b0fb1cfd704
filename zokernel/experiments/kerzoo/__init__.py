"""Experiments of Paper C (KerZOO)."""
