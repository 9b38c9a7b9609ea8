"""Families of host models: where text model, tower, placeholders and features are. One small file each."""
