"""Measures what registers do for a real network that has outliers (patches of huge norm), and what they do not."""
