"""Tests and their helpers (`tests.<module>`; run from the repository root)."""
