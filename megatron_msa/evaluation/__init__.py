"""Long-context evaluation: needles, RULER-style tasks, perplexity by position and the quality of the
selection.

Start at `plan` (what a cell is), `tasks` (what is asked) and `run` (how cells are worked through).
"""
