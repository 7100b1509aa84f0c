"""Benchmarks: programs that print and write figures (`make bench*`), never timed tests."""
