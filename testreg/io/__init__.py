"""Reads images and clips, loads models by name, saves and loads checkpoints, and joins processes."""
