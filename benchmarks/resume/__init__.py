"""Trainings that were interrupted or killed, against ones that weren't."""
