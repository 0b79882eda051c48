"""Measured results: one JSON file and one file of curves per item, and what is made of
them.
"""
