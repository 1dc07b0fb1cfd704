"""The compiled kernels of the GPU backend."""
