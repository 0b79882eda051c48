"""Speed and memory: `python -m experiments.benchmark --help`."""
