"""Load, traces and benchmarks."""
