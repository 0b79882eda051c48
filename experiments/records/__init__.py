"""Code that collects measured results, and makes tables and plots of them.

The results themselves are in `experiments/results`.
"""
