"""Entropy coding of ids: a prior per position, stored beside the weights, and a range coder."""
