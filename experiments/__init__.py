"""Scripts that run the paper's experiments: `python -m experiments.NAME --help`."""
