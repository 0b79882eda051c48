"""Measured results: one JSON file and one file of curves per item.

The code that reads and writes them is in `experiments.records`.
"""
