"""The compiled loops of the CPU backend."""
