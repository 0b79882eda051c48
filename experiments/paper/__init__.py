"""The figures and tables of the paper: `python -m experiments.paper --help`."""
