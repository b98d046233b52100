"""Trainings that were interrupted, killed or left running, against ones that were not."""
