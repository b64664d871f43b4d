"""What registers restore in a real pretrained network into which register neurons are planted."""
