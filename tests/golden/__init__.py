"""Golden runner: test vectors of one system, described by a manifest.json, through the public modules.

    python -m tests.golden DIR [--case NAME] [--list]
"""
