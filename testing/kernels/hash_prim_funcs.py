"""Hash the text that every prim_func of `prim_funcs.py` lowers to, so that a change can show what it left alone.

    python testing/kernels/hash_prim_funcs.py FILE           write the hashes
    python testing/kernels/hash_prim_funcs.py --check FILE   list what differs from FILE; the exit status says whether any does
    ... --texts FOLDER                                       also write the texts there, to compare two of them

CUDA text for sm_90a, and Metal text of what Metal takes. Text is hashed as it is emitted: names count. No GPU is needed.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "testing")]


def texts_of(family: str) -> dict[str, str]:
    """Return the texts of one family of kernels, by case and target."""
    from cuda.kernels import lower
    from kernels import prim_funcs

    from tilelang_ext import metal

    texts = {}
    for case in getattr(prim_funcs, family)():
        kernel = case.make(*case.arguments).with_attr("global_symbol", "kernel")
        texts[f"{case.name} cuda"] = lower(kernel, prim_funcs.ARCH, **case.pass_configs)
        if case.portable:
            texts[f"{case.name} metal"] = metal.lower(kernel).source
    return texts


def all_texts() -> dict[str, str]:
    """Return the texts of all families, each lowered in a process of its own."""
    from kernels.prim_funcs import FAMILIES

    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        families = pool.map(texts_of, [family.__name__ for family in FAMILIES])
        return {name: text for texts in families for name, text in texts.items()}


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
    now = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}
    if not options.check:
        options.file.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        return 0
    then = json.loads(options.file.read_text())
    differ = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    print(f"{len(now)} texts, {len(differ)} differ", *differ, sep="\n  ")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
