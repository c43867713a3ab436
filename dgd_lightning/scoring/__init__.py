"""Graders: an answer and its row in, a `Score` out. Nothing here needs a model, torch or lightning."""
