"""Golden runner: `python -m tests.golden DIR [--case NAME] [--list]`.

Runs test vectors of one system, described by DIR/manifest.json, through the public modules.
"""
