"""The weights that directions are added to: where they lie in memory, and how they are restored."""
