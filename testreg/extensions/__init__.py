"""What builds on the mechanism in `patching`: static registers, steering, and hooks that see no registers."""
