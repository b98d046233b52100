"""The figures, by what they show; `moevision.analysis.plots` has them all under one address."""
