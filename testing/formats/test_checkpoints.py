"""checkpoints: every layout there and back, and its values by the rules of HF, MLX and DeepSeek."""

import numpy as np
import pytest
import torch
from formats.operands import random_bytes, random_values
from hypothesis import given, settings
from hypothesis import strategies as st

from tilelang_ext import checkpoints
from tilelang_ext.formats import E2M1, E4M3, E8M0, MLX_MODES, BlockScaledLayout
from tilelang_ext.reference import dequantize

MX = BlockScaledLayout.e8m0_k32()
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=15)
@given(seed=seeds, lead=st.sampled_from([(), (3,), (0,)]), rows=st.integers(0, 5), groups=st.integers(1, 5))
def test_every_layout_round_trips(seed, lead, rows, groups):
    codes, scale = random_bytes(seed, *lead, rows, 16 * groups), random_bytes(seed + 1, *lead, rows, groups)

    def same(pair):
        return torch.equal(pair[0].view(torch.uint8), codes) and torch.equal(pair[1].view(torch.uint8), scale)

    blocks, scales = checkpoints.to_gpt_oss(codes, scale)
    assert blocks.shape == (*lead, rows, groups, 16)
    assert same(checkpoints.from_gpt_oss(blocks, scales))
    weight, weight_scale = checkpoints.to_deepseek_mxfp4(codes, scale)
    assert weight_scale.dtype == torch.float8_e8m0fnu
    assert same(checkpoints.from_deepseek_mxfp4(weight, weight_scale))
    assert same(checkpoints.from_deepseek_mxfp4(weight.view(torch.int8), weight_scale))
    assert same(checkpoints.from_mlx(*checkpoints.to_mlx(codes, scale, "mxfp4"), "mxfp4"))
    wide = random_bytes(seed, *lead, rows, 32 * groups).view(torch.float8_e4m3fn)
    back, back_scale = checkpoints.from_mlx(*checkpoints.to_mlx(wide, scale, "mxfp8"), "mxfp8")
    assert back.dtype == torch.float8_e4m3fn
    assert torch.equal(back.view(torch.uint8), wide.view(torch.uint8))
    assert torch.equal(back_scale, scale)
    fine = random_bytes(seed + 2, *lead, rows, 2 * groups)
    words, words_scale = checkpoints.to_mlx(codes, fine, "nvfp4")
    assert words.shape == (*lead, rows, 4 * groups)
    assert torch.equal(checkpoints.from_mlx(words, words_scale, "nvfp4")[1], fine)


def test_gpt_oss_values():
    # HF's rule, written out: low nibbles are the even elements, the scale is 2^(byte - 127) per block.
    blocks, scales = random_bytes(1, 2, 3, 4, 16), random_bytes(2, 2, 3, 4, high=16) + 120
    lut = torch.tensor(E2M1.values, dtype=torch.float64)
    expected = torch.stack([lut[(blocks & 15).long()], lut[(blocks >> 4).long()]], -1).flatten(-2)
    expected = (expected * 2.0 ** (scales[..., None].double() - 127)).flatten(-2)
    assert torch.equal(dequantize(*checkpoints.from_gpt_oss(blocks, scales), E2M1, MX), expected)
    swapped = blocks >> 4 | blocks << 4
    assert not torch.equal(dequantize(*checkpoints.from_gpt_oss(swapped, scales), E2M1, MX), expected)


@pytest.mark.parametrize("dim", [-2, 0, -1])
def test_gate_and_up_are_interleaved_rows(dim):
    gate_up = torch.arange(24).reshape(6, 4)
    gate, up = checkpoints.split_gate_up(gate_up, dim)
    assert gate.tolist() == (gate_up[:, ::2] if dim == -1 else gate_up[::2]).tolist()
    assert up.tolist() == (gate_up[:, 1::2] if dim == -1 else gate_up[1::2]).tolist()
    assert torch.equal(checkpoints.interleave_gate_up(gate, up, dim), gate_up)
    assert not torch.equal(checkpoints.interleave_gate_up(up, gate, dim), gate_up)


@pytest.mark.parametrize("mode", MLX_MODES)
def test_mlx_reads_the_same_values_from_the_same_bytes(mode):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")
    format, layout = MLX_MODES[mode]
    codes = random_bytes(3, 5, 128 if format is E4M3 else 64)
    if format is E4M3:  # MLX reads the two NaN codes as numbers
        codes = torch.where((codes & 0x7F) == 0x7F, 0, codes)
    scale = random_bytes(4, *layout.scale_shape(5, 128), high=120) + (70 if layout.scale_format is E8M0 else 0)
    words, scales = checkpoints.to_mlx(codes, scale, mode)
    got = mx.dequantize(mx.array(words.numpy()), mx.array(scales.numpy()), mode=mode, dtype=mx.float32)
    expected = dequantize(*checkpoints.from_mlx(words, scales, mode), format, layout)
    assert torch.equal(torch.from_numpy(np.array(got)).double(), expected)


@pytest.mark.parametrize("mode", MLX_MODES)
def test_values_quantised_by_mlx_are_read_back(mode):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")
    x = random_values(5, 3, 128) / 64
    words, scales = mx.quantize(mx.array(x.numpy().astype(np.float32)), mode=mode)
    pair = checkpoints.from_mlx(torch.from_numpy(np.array(words)), torch.from_numpy(np.array(scales)), mode)
    expected = np.array(mx.dequantize(words, scales, mode=mode, dtype=mx.float32))
    assert np.array_equal(dequantize(*pair, *MLX_MODES[mode]).numpy(), expected)


def test_deepseek_fp8_multiplies_by_weight_scale_inv():
    weight = random_bytes(6, 130, 200, high=0x7F).view(torch.float8_e4m3fn)
    inverse = torch.tensor([[0.5, 3.0], [7.0, 0.125]])
    codes, scale = checkpoints.from_deepseek_fp8(weight, inverse)
    values = dequantize(codes, scale, E4M3, BlockScaledLayout.block(128, 128))
    plain = weight.double()
    assert torch.equal(values[:128, :128], plain[:128, :128] * 0.5)
    assert torch.equal(values[:128, 128:], plain[:128, 128:] * 3)
    assert torch.equal(values[128:, 128:], plain[128:, 128:] * 0.125)


def test_layout_errors():
    codes, scale = random_bytes(0, 4, 32), random_bytes(0, 4, 2)
    with pytest.raises(ValueError, match=r"scale: must have shape \(4, 2\); got \(2, 4\)"):
        checkpoints.to_gpt_oss(codes, scale.T)
    with pytest.raises(ValueError, match="blocks: the last dimension must be 16 bytes; got 32"):
        checkpoints.from_gpt_oss(codes, scale)
    with pytest.raises(TypeError, match=r"words: must be uint32; got torch\.uint8"):
        checkpoints.from_mlx(codes, scale, "mxfp4")
    with pytest.raises(ValueError, match="mode: must be one of mxfp4, mxfp8, nvfp4; got 'affine'"):
        checkpoints.to_mlx(codes, scale, "affine")
    with pytest.raises(TypeError, match=r"scale: must be uint8 or torch\.float8_e8m0fnu; got torch\.float32"):
        checkpoints.from_deepseek_mxfp4(codes, scale.float())
    with pytest.raises(TypeError, match=r"weight_scale_inv: must be float32; got torch\.uint8"):
        checkpoints.from_deepseek_fp8(codes, scale)
    with pytest.raises(ValueError, match="gate_up: dimension 0 must be even; got 3"):
        checkpoints.split_gate_up(torch.zeros(3, 2), 0)
    with pytest.raises(ValueError, match="gate, up: must have equal shapes"):
        checkpoints.interleave_gate_up(torch.zeros(3, 2), torch.zeros(2, 2))
