"""What the statistics of moevision.analysis promise, by simulation."""
