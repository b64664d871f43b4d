"""What registers do for a network whose outliers emerged by themselves, and what they do not."""
