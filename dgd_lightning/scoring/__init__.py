"""Scores of answers, and what can be said of them."""
