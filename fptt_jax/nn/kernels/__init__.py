"""Compiled kernels that run a whole window of a cell, one package per platform."""
