"""The Hugging Face Hub: register neurons and patched checkpoints as repositories."""
