"""Real models and data without a hub (:func:`fetch`), and tables from a user's own files (:func:`load_table`)."""

from zokernel.data.sources import SOURCES, fetch, load_mnist
from zokernel.data.tables import load_rows, load_table, resolve_model_path

__all__ = ["SOURCES", "fetch", "load_mnist", "load_rows", "load_table", "resolve_model_path"]
