"""Training objectives, one file each (registry kind `step`)."""
