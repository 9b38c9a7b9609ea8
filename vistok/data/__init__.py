"""Data: data sets under one protocol, and a loader whose every sample is a function of (seed, step, sample)."""
