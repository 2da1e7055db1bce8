"""What tools/profile_step.py makes of a profile: time and memory by part of the model."""
