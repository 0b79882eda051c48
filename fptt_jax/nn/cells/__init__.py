"""Recurrent layers: one file per cell.

A file holds the layer, its step, the parts of its hand-written backward pass and its
CUDA kernel's arguments.
"""
