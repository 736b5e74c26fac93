"""Methods of delta compression: one paper, one file."""
