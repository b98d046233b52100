"""What the faults that the stability guard mends cost a training."""
