"""Every name of the language on every target: executed and compared, refused with one error, or upstream's own.

A name that no row of `testing/language/table` lists fails here, and so does a cell whose claim no longer holds. Forty rows of a
family are one kernel, since lowering takes more than in proportion; a chip whose text is another's is not executed again.
"""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tilelang
import torch
from language.table import elementwise, page, refused, statements, tested, threads
from language.table.rows import TARGETS, Recorder, exists, lower, public_names

from tilelang_ext import language, simulate

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {
    "elementwise": (elementwise, elementwise.ROWS),
    "threads": (threads, threads.ROWS),
    "statements": (statements, statements.ROWS),
    "gemm": (statements, statements.GEMMS),
}
ROWS = 40  # of a kernel
# Whose text a chip's may be: it is executed where it differs.
LIKE = {"metal4": "metal", "gfx950": "gfx942", "gfx1100": "gfx942", "gfx1201": "gfx1100"}
WARP = {"gfx942": 64, "gfx950": 64}


def test_every_name_is_listed():
    assert sorted(public_names() - set(page.listed())) == []


def test_page_is_up_to_date():
    if tilelang.__version__.startswith("0.1.14"):
        pytest.skip("the page is written with the names of tilelang 0.1.15")
    assert page.PAGE.read_text() == page.text(), "out of date: run PYTHONPATH=testing python -m language.table.page"


def test_names_are_tested_where_the_page_says():
    for name, file in tested.files().items():
        assert re.search(rf"\b(T|language)\.{name}\b", (ROOT / file).read_text()), (name, file)


def rows_of(family, target):
    return [row for row in FAMILIES[family][1] if row.is_executed(target) and exists(row.name)]


@cache
def kernel(family, names):
    module, rows = FAMILIES[family]
    language = Recorder()
    chosen = [row for row in rows if row.name in names]
    func = module.kernel(chosen, language)
    assert {row.name for row in chosen} <= language.used, "a row does not use its name"
    return func


def kernels(family, target):
    """The rows that are executed on a target, a part at a time, and the kernel of each part."""
    rows = rows_of(family, target)
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        yield part, kernel(family, tuple(row.name for row in part))


lowered = cache(lower)


def text(func, target):
    return re.sub(r"gfx\w+", "", lowered(func, target).source)


def arguments(family, rows):
    module = FAMILIES[family][0]
    given = module.inputs()
    if module is statements:
        C = torch.from_numpy(given["B"]).float().repeat(len(rows), 1, 1).contiguous()
        return given, [*map(torch.from_numpy, given.values()), C], [C]
    shape = (len(rows), len(given["x"]))
    outputs = [torch.full(shape, float("nan")), torch.full(shape, -12345, dtype=torch.int32)]
    return given, [*map(torch.from_numpy, given.values()), *outputs], outputs


def wrong_rows(family, target, rows, given, outputs):
    wide = {name: value.astype(np.int64 if value.dtype == np.int32 else np.float64) for name, value in given.items()}
    if family == "threads":
        wide["wave"] = WARP.get(target, 32)
    wrong = []
    for k, row in enumerate(rows):
        want = np.asarray(row.want(**wide))
        got = outputs[0][k].double().numpy()
        if len(outputs) == 2 and np.isnan(got).all():
            got = outputs[1][k].double().numpy()
        matters = np.ones(want.shape, bool) if family == "elementwise" else ~np.isnan(want)
        if not np.allclose(got[matters], want[matters], rtol=2e-5, atol=1e-6, equal_nan=True):
            wrong.append(row.name)
    return wrong


def run(func, target, tensors):
    if target == "c":
        tilelang.compile(func, target="c")(*tensors)
        return
    report = simulate(lowered(func, target), *tensors, target=TARGETS[target])
    assert not report.findings, str(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_values(family):
    """All targets in one test, so that each kernel is lowered once for its text and its values."""
    wrong = {}
    for target in TARGETS:
        assert rows_of(family, target) or (family, target) == ("threads", "c")
        for rows, func in kernels(family, target):
            like = LIKE.get(target)
            if like and func in (other for _, other in kernels(family, like)) and text(func, target) == text(func, like):
                continue
            given, everything, outputs = arguments(family, rows)
            run(func, target, everything)
            if names := wrong_rows(family, target, rows, given, outputs):
                wrong[target] = wrong.get(target, []) + names
    assert wrong == {}, "these names compute something else"


def test_make_tensor():
    """A tensor at a pointer that is a parameter of the kernel."""

    @language.prim_func
    def func(X: language.handle, C: language.Tensor((8, 32), "float32")):
        with language.Kernel(1, threads=32):
            A = language.make_tensor(X, (8, 32), "float16")
            for i, j in language.Parallel(8, 32):
                C[i, j] = language.cast(A[i, j], "float32")

    A = torch.arange(256.0).half().reshape(8, 32)
    for target in ("metal", "gfx942", "c"):
        C = torch.full((8, 32), torch.nan)
        run(func, target, [A, C])
        assert torch.equal(C, A.float()), target


def refuses(func, target, pattern, name):
    with pytest.raises((NotImplementedError, TypeError, ValueError)) as caught:
        lower(func, target)
    message = str(caught.value)
    assert re.search(pattern, message), (name, target, message)
    assert len(message.splitlines()) == 1, (name, target, message)


@pytest.mark.parametrize("row", [row for row in refused.ROWS if exists(row.name)], ids=lambda row: row.name)
def test_refused_on_every_target(row):
    language = Recorder()
    func = refused.kernel(row, language)
    assert row.name in language.used
    for target in ("metal", "gfx942", "c"):  # the others have the same pass lists
        refuses(func, target, row.error(target), row.name)


@pytest.mark.parametrize("target", ["metal", "gfx942", "c"])
def test_refused_on_one_target(target):
    for module, rows in FAMILIES.values():
        for row in rows:
            if row.error(target) and exists(row.name):
                refuses(module.kernel([row]), target, row.error(target), row.name)
