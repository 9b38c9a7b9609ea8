"""Quantizers: from continuous features to ids and back. One interface, any tokenizer."""
