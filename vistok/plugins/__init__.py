"""Where compression happens: hooks on unmodified host models, with undo. `families/` has one file per kind of host."""
