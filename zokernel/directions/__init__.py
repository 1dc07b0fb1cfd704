"""Random directions."""
