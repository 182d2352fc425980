"""Techniques of training, one file each. Most are context managers: inside, the model is trained that way."""
