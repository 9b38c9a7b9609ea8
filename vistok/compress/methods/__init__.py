"""Compression methods, one file per paper."""
