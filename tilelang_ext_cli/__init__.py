"""The `tilelang-ext` command. It stands outside the package, since it must speak when `import tilelang_ext` cannot."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run `tilelang-ext` with `arguments` (default: the command line) and return its exit code."""
    parser = argparse.ArgumentParser(prog="tilelang-ext", description="TileLang kernels and a Metal backend with a simulator.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, what is missing, what that disables and how to get it")
    parser.parse_args(arguments)

    from tilelang_ext_cli.doctor import diagnose, show

    checks = diagnose()
    show(checks)
    return 1 if any(check.required and not check.ok for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
