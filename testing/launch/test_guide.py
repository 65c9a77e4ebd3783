"""The guide of plans: its programs run, on the driver that writes down what it is told, and print what it says."""

import re
from pathlib import Path

import torch
from launch.fakes import FakeCuda, cubin_of

from tilelang_ext.launch import recipe

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "plans.md"


def test_programs_of_the_guide(monkeypatch, capsys, tmp_path):
    cuda = FakeCuda()

    def without_nvcc(key, make, arch, pass_configs, alignment):
        lowered = recipe.lower(make(), arch, pass_configs, alignment)
        return lowered, cubin_of(lowered.variant)

    monkeypatch.setattr(recipe, "compile_cached", without_nvcc)
    monkeypatch.setattr(recipe, "launcher", lambda: cuda.launcher)
    text = GUIDE.read_text()
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)).replace(', device="cuda"', "")
    path = tmp_path / "guide.py"  # the tile language reads its source
    path.write_text(program)
    names = {}
    exec(compile(program, str(path), "exec"), names)
    assert capsys.readouterr().out == "".join(re.findall(r"```text\n(.*?)```", text, re.DOTALL))
    first, second = cuda.launches()
    assert first == second
    assert first.grid == (8, 1, 1)
    x, y = names["x"], names["y"]
    assert sorted(first.parameters) == sorted([x.data_ptr(), y.data_ptr(), 8, 512, 0x3F000000])
    assert x.stride() == (512, 1)
    assert isinstance(x, torch.Tensor)
    assert names["out"].isfinite().all()
