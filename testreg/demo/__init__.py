"""The main job on the model that comes with the package."""
