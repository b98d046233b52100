"""Load over a training, without and with a balance loss."""
