"""Benchmarks of speed and memory against baselines (`make bench`)."""
