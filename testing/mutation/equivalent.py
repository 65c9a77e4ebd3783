"""Mutants that change nothing that a test could notice, with the reason: path, changed lines before and after."""

EQUIVALENT: dict[tuple[str, str, str], str] = {}
