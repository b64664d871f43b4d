"""Imitations of models whose code cannot be installed from PyPI, for tests and `scripts/coverage`.

They have the originals' names of classes and modules, and the same forms of output. They do not compute the same
numbers, and the originals' weights do not load into them (except OpenAI's CLIP, see `clip.visual_state`).
"""
