"""Images, models by name, checkpoints and processes."""
