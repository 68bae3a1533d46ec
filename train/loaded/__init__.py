"""Trained models, loaded for use; `load.load` is the way in."""
