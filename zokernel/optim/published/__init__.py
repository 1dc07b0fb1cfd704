"""One published method per file: a short recipe of directions, estimator and update."""
