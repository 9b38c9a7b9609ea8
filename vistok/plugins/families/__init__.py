"""Families of host models (where text model, tower, placeholders and features are) and kinds of vision transformers."""
