"""Reads a model, patched or not: outliers, attention, ranking, diagnosis."""
