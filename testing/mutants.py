"""Draw single-point mutants of files, and say of each whether a test notices it.

    python testing/mutants.py tilelang_ext/passes src/simulator/memory.h --count 20 --seed 1

Per mutant it prints a line: killed, and by which test; survived; equivalent (mutation/equivalent.py says why); or invalid, if
no compiler takes it. At the end it prints the counts of each folder. A test kills if it fails with the mutant and passes
without. What has been judged is kept in build/mutants.jsonl and not run again as long as the file is the same; --survivors runs
again what survived. A mutant is given --limit seconds; then it has survived, unless a single test hangs. Of src/metal and
src/launch the .cc files are drawn from, each of which is compiled alone; headers of the simulator are compiled by the tests.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from mutation.copy_of_tree import LIBRARIES, Copy, Outcome
from mutation.draw import Mutant, draw
from mutation.equivalent import EQUIVALENT
from mutation.which_tests import ROOT, tests_of

JUDGED = ROOT / "build" / "mutants.jsonl"
SUFFIXES = (".py", ".cc", ".h")
STATES = ("killed", "survived", "equivalent", "invalid")
# What a test reports if C++ that is compiled when it runs is no C++: no test has noticed anything.
NO_PROGRAM = ("CompileError: source: must be text that the shim compiles", "error: static assertion failed")


def files(names: list[str]) -> list[str]:
    """The sources below the names, relative to the root, as git lists them."""
    listed = subprocess.run(["git", "ls-files", "--", *names], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = [name for name in listed.splitlines() if name.endswith(SUFFIXES) and tests_of(name)]
    found = [name for name in found if not name.endswith(".h") or not name.startswith(tuple(LIBRARIES))]
    if not found:
        raise SystemExit(f"FILES: must be sources of tilelang_ext or src; got {' '.join(names)}; name files or folders")
    return found


def key_of(mutant: Mutant, text: str) -> str:
    return hashlib.sha256(f"{mutant} {text}".encode()).hexdigest()[:16]


class Judge:
    def __init__(self, copy: Copy, limit: float):
        self.copy, self.limit = copy, limit

    def judge(self, mutant: Mutant, text: str) -> tuple[str, str]:
        """Return the state and the test that kills."""
        _, before, after = mutant.lines(text)
        if (mutant.path, before, after) in EQUIVALENT:
            return "equivalent", ""
        try:
            if not self.copy.build(mutant.path, mutant.apply(text)):
                return "invalid", ""
            found = self.run(tests_of(mutant.path))
        finally:
            self.copy.restore(mutant.path, text)
        if found.status == "no tests":
            raise SystemExit(f"{mutant.path}: must have tests; got none that ran; see mutation/which_tests.py")
        if found.status in ("passed", "stopped"):
            return "survived", f"no more time in {found.test}" if found.status == "stopped" else ""
        if mutant.path.endswith(".h") and any(words in found.message for words in NO_PROGRAM):
            return "invalid", ""
        return "killed", found.test

    def run(self, tests: list[str]) -> Outcome:
        """Run the near tests, then the folders: to collect those takes longer than most mutants need."""
        start, found = time.time(), Outcome("no tests")
        near = [name for name in tests if ".py" in name]
        for stage in (near, [name for name in tests if name not in near]):
            if stage:
                last = self.copy.run(stage, start + self.limit - time.time())
                found = found if last.status == "no tests" else last
            if found.status not in ("passed", "no tests"):
                break
        return found


def check_without_mutants(copy: Copy, tests: list[str]) -> None:
    """The tests that kill pass without a mutant; else they have noticed nothing."""
    names = [test for test in tests if "::" in test]  # the others are files that did not import
    if names and (found := copy.run(names, 60.0 * len(names))).status != "passed":
        raise SystemExit(f"{found.test}: must pass without a mutant; got {found.status}\n{found.message}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", help="files or folders below tilelang_ext and src")
    parser.add_argument("--count", type=int, default=20, help="how many mutants")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300, help="seconds for the tests of one mutant")
    parser.add_argument("--survivors", action="store_true", help="run again what survived before")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    judged = {}
    if JUDGED.exists():
        judged = {row["key"]: row for row in map(json.loads, JUDGED.read_text().splitlines())}
    drawn = [mutant for mutant, _ in zip(draw(ROOT, files(options.files), options.seed), range(options.count), strict=False)]
    texts = {mutant.path: (ROOT / mutant.path).read_text() for mutant in drawn}  # the checkout may change while this runs
    counts, killers = defaultdict(Counter), set()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        sys.dont_write_bytecode = True  # which is told apart by whole seconds and sizes
        os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "TILELANG_CACHE_DIR": f"{folder}/caches"}
        if not options.list:
            import_slowly()
            judge = Judge(Copy(ROOT, Path(folder, "tree")), options.limit)
        for mutant in drawn:
            text = texts[mutant.path]
            line, before, after = mutant.lines(text)
            shown = f"{mutant.path}:{line}: {before}  =>  {after}"
            if options.list:
                print(shown)
                continue
            key = key_of(mutant, text)
            row = judged.get(key)
            if row is None or (row["state"] == "survived" and options.survivors):
                start = time.time()
                state, test = judge.judge(mutant, text)
                row = {
                    "key": key,
                    "path": mutant.path,
                    "state": state,
                    "test": test,
                    "mutant": shown,
                    "seconds": round(time.time() - start),
                }
                JUDGED.parent.mkdir(exist_ok=True)
                with JUDGED.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            counts[str(Path(mutant.path).parent)][row["state"]] += 1
            if row["state"] == "killed":
                killers.add(row["test"])
            print(f"{row['state']:10} {shown}" + (f"\n{'':10} {row['test']}" if row["test"] else ""), flush=True)
        if not options.list:
            check_without_mutants(judge.copy, sorted(killers))
    for path in sorted(counts):
        print(summary(path, counts[path]))
    print(summary("in all", sum(counts.values(), Counter())))


def summary(name: str, count: Counter) -> str:
    judged = count["killed"] + count["survived"]
    part = f"{100 * count['killed'] / judged:.0f}%" if judged else "-"
    return f"{name:32} {part:>5} killed  " + "  ".join(f"{state} {count[state]}" for state in STATES)


def import_slowly() -> None:
    """Import what every test needs and no mutant changes, once for all the processes that this one forks."""
    import hypothesis
    import numpy
    import pytest
    import tilelang
    import torch

    del hypothesis, numpy, pytest, tilelang, torch


if __name__ == "__main__":
    main()
