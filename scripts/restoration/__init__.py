"""Measures what registers restore in a real pretrained network into which register neurons were planted."""
