"""The code that generates directions and adds them: numba on CPUs, Triton on GPUs, torch as the reference."""
