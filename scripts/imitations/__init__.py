"""Models whose code cannot be installed, imitated: their classes, modules and outputs, for tests and the coverage.

Weights do not load into them, and nothing here shows that the originals compute the same numbers.
"""
