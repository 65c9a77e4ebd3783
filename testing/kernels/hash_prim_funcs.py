"""Hash the text that every prim_func of `prim_funcs.py` lowers to, so that a change can show what it left alone.

    python testing/kernels/hash_prim_funcs.py FILE           write the hashes
    python testing/kernels/hash_prim_funcs.py --check FILE   list what differs from FILE; the exit status says whether any does
    ... --texts FOLDER                                       also write the texts there, to compare two of them

A tool for moves, which no test runs, since it lowers for minutes: `prim_func_hashes.json` is of the commit that wrote it last.
Write a file at the commit before the move, and check against it after. What only host code says is not compared, such as how a
tensor map swizzles.

CUDA text for sm_90a, and Metal text of what Metal takes; no GPU is needed. Each text has two hashes: as it is emitted, and up
to the names of its variables. Upstream places shared buffers of one size in an order that differs from run to run, so their
offsets are compared as a set.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "testing")]

_SHARED = re.compile(r"^ *void\* (\w+) = \(\(void\*\)\(\(char\*\)buf_dyn_shmem \+ (\d+)\)\);\n", re.MULTILINE)
# An identifier that is no function, template, member or part of a qualified name.
_VARIABLE = re.compile(r"(?<![\w.:])[A-Za-z_]\w*\b(?!\s*\(|<|::)")
_KEPT = {
    *[
        "const",
        "void",
        "char",
        "int",
        "uint",
        "short",
        "long",
        "float",
        "double",
        "half",
        "bool",
        "unsigned",
        "for",
        "if",
        "else",
        "while",
        "return",
        "true",
        "false",
    ]
}


def with_shared_buffers_in_order(text: str) -> str:
    """Return the text with shared buffers named by first use, and their offsets as a sorted list in front."""
    buffers = dict(_SHARED.findall(text))
    text = _SHARED.sub("", text)
    if buffers:
        names = {}
        pattern = re.compile(r"\b(" + "|".join(buffers) + r")\b")
        text = pattern.sub(lambda found: names.setdefault(found[1], f"shared_{len(names)}"), text)
    return "\n".join([*sorted(buffers.values(), key=int), text])


def without_names(text: str) -> str:
    """Return the text with its variables named by first appearance."""
    names = {}

    def rename(found: re.Match) -> str:
        return found[0] if found[0] in _KEPT else names.setdefault(found[0], f"name_{len(names)}")

    return _VARIABLE.sub(rename, text)


def texts_of(family: str) -> dict[str, str]:
    """Return the texts of one family of kernels, by case and target."""
    from cuda.kernels import lower
    from kernels import prim_funcs

    from tilelang_ext import metal

    texts = {}
    for case in getattr(prim_funcs, family)():
        kernel = case.make(*case.arguments).with_attr("global_symbol", "kernel")
        if "cuda" in case.targets:
            texts[f"{case.name} cuda"] = lower(kernel, prim_funcs.ARCH, **case.pass_configs)
        if "metal" in case.targets:
            texts[f"{case.name} metal"] = metal.lower(kernel).source
    return texts


def all_texts() -> dict[str, str]:
    """Return the texts of all families, each lowered in a process of its own."""
    from kernels.prim_funcs import FAMILIES

    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        families = pool.map(texts_of, [family.__name__ for family in FAMILIES])
        return {name: with_shared_buffers_in_order(text) for texts in families for name, text in texts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--texts", type=Path)
    options = parser.parse_args()
    texts = all_texts()
    if options.texts:
        options.texts.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (options.texts / f"{name}.txt").write_text(text)

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    now = {name: {"text": digest(text), "up to names": digest(without_names(text))} for name, text in texts.items()}
    if not options.check:
        options.file.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        return 0
    then, differ = json.loads(options.file.read_text()), 0
    for name in sorted(now.keys() | then.keys()):
        first, second = then.get(name), now.get(name)
        if first != second:
            same = first is not None and second is not None and first["up to names"] == second["up to names"]
            differ += not same
            print(f"{name}: {'other names' if same else 'another text' if first and second else 'one side only'}")
    print(f"{len(now)} texts; {differ} differ by more than names")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
