"""Readouts, one file each: second sets of logits that the target may be blended with, and their null controls."""
