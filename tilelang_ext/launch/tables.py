"""Tables of measured choices: what `tilelang-ext tune` wrote, which operators ask before their models.

A table is a JSON file of one operator and one device. It counts only where it was measured: on this device, with these
versions, and with these sources of the kernels; another is ignored, with one warning. The tables of the user, in the cache's
folder, come before those that the package has.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import re
import tokenize
import warnings
from pathlib import Path

import tilelang
import torch

import tilelang_ext
from tilelang_ext.launch import cache

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = PACKAGE / "tables"
_RULES = {
    "device": "this device",
    "versions": "these versions",
    "sources": "this commit, by the digest of the kernels' sources",
}


def folder() -> Path:
    """Return the folder of the user's tables; it need not exist."""
    return cache.folder().parent / "tables"


def file_of(operator: str, device: str) -> str:
    """Return the name of a table's file."""
    return f"{operator}-{re.sub('[^a-z0-9]+', '_', device.lower())}.json"


def identity(operator: str, device: str, kernels: tuple[str, ...]) -> dict:
    """Return what a table must agree with: device, versions, digest of the sources of the operator's kernels."""
    versions = {"tilelang": tilelang.__version__, "tilelang_ext": tilelang_ext.__version__}
    return {"operator": operator, "device": device, "versions": versions, "sources": digest_of(operator, kernels)}


@functools.cache
def digest_of(operator: str, kernels: tuple[str, ...]) -> str:
    """Return the digest of what decides how fast kernels are: the code of these files below `kernels`, without docstrings and
    comments.

    An installed package has no commit; this stands in its place.
    """
    digest = hashlib.sha256(operator.encode())
    for name in kernels:
        digest.update(code_of((PACKAGE / "kernels" / f"{name}.py").read_text()).encode())
    return digest.hexdigest()[:16]


def code_of(source: str) -> str:
    """Return a source without docstrings, comments and empty lines: the same text on every version of Python."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            lines[body[0].lineno - 1 : body[0].end_lineno] = [""] * (body[0].end_lineno - body[0].lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


@cache.until_reload
def choices_of(operator: str, kernels: tuple[str, ...]) -> dict[str, dict]:
    """Return the choices that tables have for this process's device, by the key of a problem; none without a GPU."""
    if not torch.cuda.is_available():
        return {}
    device = torch.cuda.get_device_name()
    found: dict[str, dict] = {}
    for place in (SHIPPED, folder()):  # the user's replace the package's
        found |= read(place / file_of(operator, device), identity(operator, device, kernels))
    return found


def read(path: Path, wanted: dict) -> dict[str, dict]:
    """Return the choices of a table by key; none where there is no table, or, with one warning, where it cannot be used."""
    try:
        table = json.loads(path.read_text())
        differing = [name for name in wanted if table[name] != wanted[name]]
        if not differing:
            return {row["key"]: row["choice"] for row in table["rows"]}
        name = differing[0]
        reason = f"must be of {_RULES.get(name, name)}; got {table[name]}, here {wanted[name]}"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"must be a table of `tilelang-ext tune`; got {type(error).__name__}: {error}"
    warnings.warn(
        f"table {path.name}: {reason}; it is ignored: run `tilelang-ext tune {wanted['operator']}` again, or remove it",
        stacklevel=2,
    )
    return {}
