"""What is measured, and under `results/` what was measured."""
