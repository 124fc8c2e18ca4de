"""Speed and memory, side by side with honest baselines: `make bench`."""
