"""`python -m quantlib doctor [--json]` and `python -m quantlib docs [--check] [folder]`."""

from __future__ import annotations

import argparse
import json
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m quantlib", description="Quantized networks as exact integers, and as C++ for FPGAs.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is installed and what is known not to work: paste it into a bug report")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    docs = commands.add_parser("docs", help="write the generated pages: the ops, and the networks of the zoo where it is installed")
    docs.add_argument("folder", nargs="?", default="docs", help="where the pages go (default: docs)")
    docs.add_argument("--check", action="store_true", help="write nothing; fail when a page is out of date")
    args = parser.parse_args(arguments)
    if args.command == "doctor":
        from quantlib.doctor import examine, report

        found = examine()
        print(json.dumps(found, indent=2) if args.json else report(found))
        return 1 if found["problems"] else 0
    from quantlib.pages import stale, write

    if args.check:
        old = stale(args.folder)
        for name in old:
            print(f"{name} is out of date: run `python -m quantlib docs`")
        return 1 if old else 0
    for path in write(args.folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
