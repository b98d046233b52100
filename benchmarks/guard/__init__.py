"""What the stability guard costs, and what the faults it mends cost a training."""
