"""`moevision benchmark`: what a layer, a training step, inference and the input pipeline cost on this machine."""
