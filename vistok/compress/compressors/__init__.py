"""Trained compressors, each with the projector behind it: kept in folders, put on hosts by the method of their name."""
