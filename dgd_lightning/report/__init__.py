"""Finished run folders as pages for people."""
