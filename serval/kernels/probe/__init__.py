"""C++ loops that measure what the machine can do; used by serval.kernels.bandwidth."""
