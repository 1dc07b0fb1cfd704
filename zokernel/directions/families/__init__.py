"""Families of random directions: which coordinates are random, and how."""
