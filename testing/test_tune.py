"""`tilelang-ext tune` without a GPU: the journal goes on where a run ended, the table, and what becomes of another's table."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from tilelang_ext import tune
from tilelang_ext.kernels.scaled_mm import selection, sm90_config, tuning
from tilelang_ext.launch import cache, tables
from tilelang_ext.launch.device import Target
from tilelang_ext_cli import main

H200 = Target("cuda", "sm_90a", 132)
DEVICE = "NVIDIA H200"
IDENTITY = tables.identity("scaled_mm", DEVICE, selection.KERNELS)


@pytest.fixture
def on_h200(monkeypatch, tmp_path):
    """A process that sees the GPU and has tables of its own; both are forgotten afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: DEVICE)
    monkeypatch.setattr(tables, "folder", lambda: tmp_path)
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    cache.reload()
    yield tmp_path / tables.file_of("scaled_mm", DEVICE)
    cache.reload()


@pytest.fixture
def measurements(monkeypatch):
    """Times that are made up: a choice takes as many microseconds as measurements came before it; some results are wrong."""
    done = []

    def measure(case, choices):
        for choice in choices:
            done.append((case.key, choice))
            wrong = choice.config == case.choices(3)[0].config
            yield choice, None if wrong else 100.0 - len(done), "error 1e+00" if wrong else None

    monkeypatch.setattr(tune, "_measure", measure)
    monkeypatch.setattr(tune, "_compile", lambda *arguments: None)
    monkeypatch.setattr(tune, "target_of", lambda name, device: H200)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return done


def run(sizes=("16x4096x7168", "300x1024x2048"), **options):
    return tune.tune("scaled_mm", sizes, kinds=("row_fast",), candidates=3, **options)


def test_table_and_choice(on_h200, measurements):
    """The fastest choice whose result is right is in the table, with every time, and the operator takes it."""
    path = run()
    table = json.loads(path.read_text())
    assert path == on_h200
    assert {name: table[name] for name in IDENTITY} == IDENTITY
    assert [len(row["measured"]) for row in table["rows"]] == [len(of) for _, of in tune._by_case(_cases_and_choices())]
    assert all(any("error" in one for one in row["measured"]) for row in table["rows"])
    cache.reload()
    for (case, _), row in zip(tune._by_case(_cases_and_choices()), table["rows"], strict=True):
        right = [one for one in row["measured"] if one["us"] is not None]
        assert row["choice"] == min(right, key=lambda one: one["us"])["choice"]
        assert selection.as_data(selection.pick(case.problem)) == row["choice"]
        assert selection.pick(case.problem) != sm90_config.pick(case.problem), "the first, whose result is wrong"


def _cases_and_choices():
    cases = tuning.cases(("16x4096x7168", "300x1024x2048"), (), ("row_fast",), H200)
    return [(case, choice) for case in cases for choice in case.choices(3)]


def test_interrupted(on_h200, measurements, monkeypatch):
    """A run that ends in the middle of a size, and in the middle of a line, loses no whole line; none is measured twice."""
    whole = tune._measure

    def interrupted(case, choices):
        for count, result in enumerate(whole(case, choices)):
            if len(measurements) == 5:
                raise KeyboardInterrupt
            assert count < len(choices)
            yield result

    monkeypatch.setattr(tune, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    journal = on_h200.with_suffix(".jsonl")
    assert len(journal.read_text().splitlines()) == 1 + 4
    with open(journal, "a") as file:
        file.write('{"key": "fast 16x')
    monkeypatch.setattr(tune, "_measure", whole)
    kept = measurements[:4]
    measurements.clear()
    table = json.loads(run().read_text())
    assert not set(kept) & set(measurements)
    assert len(kept) + len(measurements) == len(_cases_and_choices()) == sum(len(row["measured"]) for row in table["rows"])
    measurements.clear()
    run()
    assert not measurements


def test_journal_of_another_device(on_h200, measurements, capsys):
    run(sizes=("16x4096x7168",))
    journal = on_h200.with_suffix(".jsonl")
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([json.dumps({**IDENTITY, "device": "NVIDIA H100"}), *lines[1:]]) + "\n")
    measurements.clear()
    run(sizes=("16x4096x7168",))
    assert measurements
    assert journal.with_suffix(".old").read_text().splitlines()[1:] == lines[1:]
    assert capsys.readouterr().err.count("is of another device, version or commit") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "NVIDIA H100"}, "must be of this device; got NVIDIA H100, here NVIDIA H200; it is ignored"),
        ({"versions": {"tilelang": "0.1"}}, "must be of these versions; got .*'0.1'.*, here .*; it is ignored"),
        ({"sources": "0123"}, "must be of this commit, by the digest of the kernels' sources; got 0123, here"),
        ({"rows": [{"key": "one"}]}, "must be a table of `tilelang-ext tune`; got KeyError: 'choice'; it is ignored"),
        (None, "must be a table of `tilelang-ext tune`; got JSONDecodeError"),
    ],
)
def test_tables_that_are_ignored(on_h200, measurements, changes, message):
    """With one line, however often an operator asks; the model chooses then."""
    table = json.loads(run(sizes=("16x4096x7168",)).read_text())
    on_h200.write_text("{" if changes is None else json.dumps(table | changes))
    cache.reload()
    [case] = tuning.cases(("16x4096x7168",), (), ("row_fast",), H200)
    with pytest.warns(UserWarning, match=rf"table {on_h200.name}: {message}") as warned:
        picked = [selection.pick(of) for of in (case.problem, replace(case.problem, max_M=300), case.problem)]
    assert picked[0] == picked[2] == sm90_config.pick(case.problem)
    assert len(warned) == 1


def test_a_choice_that_is_none_is_not_taken(on_h200, measurements):
    """As of a table that somebody has changed: its configuration would not fit."""
    table = json.loads(run(sizes=("16x4096x7168",)).read_text())
    table["rows"][0]["choice"]["config"]["num_stages"] = 99
    on_h200.write_text(json.dumps(table))
    cache.reload()
    [case] = tuning.cases(("16x4096x7168",), (), ("row_fast",), H200)
    assert selection.pick(case.problem) == sm90_config.pick(case.problem)


def test_users_table_comes_first(on_h200, measurements):
    shipped = tables.SHIPPED / on_h200.name
    shipped.parent.mkdir()
    key = [row["key"] for row in json.loads(run(path=shipped).read_text())["rows"]]
    mine = json.loads(run(sizes=("16x4096x7168",)).read_text())
    cache.reload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choices = tables.choices_of("scaled_mm", selection.KERNELS)
    assert list(choices) == key
    assert choices[key[0]] == mine["rows"][0]["choice"]


def test_prose_is_no_other_commit(tmp_path, monkeypatch):
    """A docstring or a comment changes no digest, a constant does."""
    digests = []
    for text in ('"""One."""\nX = 1\n', '"""Two."""\nX = 1  # why\n', "X = 2\n"):
        (tmp_path / "kernels" / "op").mkdir(parents=True, exist_ok=True)
        (tmp_path / "kernels" / "op" / "kernel.py").write_text(text)
        monkeypatch.setattr(tables, "PACKAGE", tmp_path)
        tables.digest_of.cache_clear()
        digests.append(tables.digest_of("op", ("op/kernel",)))
    tables.digest_of.cache_clear()
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("16x4096", "tune: a size must be as 16x4096x7168, M, N and K; got 16x4096; write it so"),
        ("16x4096x300000", "tune: K must be from 1 to 262144; got 300000 in 16x4096x300000; tune a smaller size"),
        ("0x4096x7168", "tune: M must be from 1 to 65536; got 0 in 0x4096x7168; tune a smaller size"),
        ("16x4096x72", "tune: 16x4096x72 must be for sm_90a, K a multiple of 16 and N of 8; got a sm_90a"),
    ],
)
def test_sizes_that_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        tuning.cases((size,), (), ("row_fast",), H200)


def test_command_without_a_gpu(capsys):
    assert main(["tune", "scaled_mm", "llama-3.1-8b-fp8"]) == 2
    assert "tune: must run on an NVIDIA GPU; got none" in capsys.readouterr().err


def test_the_code_of_a_source_is_the_same_text_on_every_python():
    """Comments, docstrings and empty lines are gone, and a # in a string stays."""
    source = '"""Doc\nof two lines."""\n\nX = "#1"  # one\n\n\ndef f(a):\n    """Doc."""\n    # why\n    return f"{a} #"\n'
    assert tables.code_of(source) == 'X = "#1"\ndef f(a):\n    return f"{a} #"'
