"""No benchmarks: programs that look for mistakes in the kernels, by compute-sanitizer or at random."""
