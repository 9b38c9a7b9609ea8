"""Host models as things to train: one file per library they come from."""
