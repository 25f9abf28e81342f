"""From `results/` to the paper's tables and figures. Reads small files, runs no model, never imports torch."""
