"""The trainer: configuration, model, data order, strategies, checkpoints, reports."""
