"""Visual tokenizers: the base, one file per system, and the layouts of published checkpoints (`official`)."""
