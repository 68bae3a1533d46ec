"""Command line of the golden runner."""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda or tpu runs the vectors there

from .manifest import ManifestError, load_manifest


def main(argv: list[str] | None = None) -> int:
    """Runs a folder of vectors: 0 all pass, 1 something fails, 2 the folder cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden",
        description="Run a folder of golden test vectors (manifest.json, .npz, .safetensors) "
        "through the public modules. One line per case: worst error as a multiple of the "
        "tolerance, pass or fail.",
    )
    parser.add_argument("dir", help="folder with a manifest.json")
    parser.add_argument(
        "--case", action="append", metavar="NAME", help="only this case (repeatable)"
    )
    parser.add_argument("--list", action="store_true", help="print the case names and stop")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(argv)
    try:
        manifest = load_manifest(options.dir)
        if options.list:
            print(*manifest.cases, sep="\n")
            return 0
        names = options.case or list(manifest.cases)
        for name in names:
            if name not in manifest.cases:
                raise ManifestError(f"no case {name!r}; --list shows the names")
        from .runner import load_families, run_case

        load_families(manifest)
    except ManifestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed, seconds = [], 0.0
    for name in names:
        outcome = run_case(manifest, name, debug=options.debug)
        print(outcome.line, flush=True)
        seconds += outcome.seconds
        failed += [] if outcome.passed else [name]
    verdict = f"{len(failed)} FAIL" if failed else "all pass"
    print(f"{len(names)} cases, {verdict}, {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
