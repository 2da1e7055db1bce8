"""How a training step is run: one small interface, one file for each way."""
