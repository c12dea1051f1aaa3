"""Scores to look at: a page for the browser, a program for the terminal, an output for the notebook.

`entra.view.trace` is what all of them show; it needs no model.
"""
