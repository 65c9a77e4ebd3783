"""`MXFP4Experts` against the experts of HF transformers, its names in checkpoints, and its errors by message."""

import copy
import io
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from numeric import assert_close
from safetensors.torch import load_model, save_file

from tilelang_ext import reference
from tilelang_ext.formats import E2M1, BlockScaledLayout
from tilelang_ext.kernels.mxfp4_moe import experts as module_of_experts
from tilelang_ext.kernels.mxfp4_moe import operator
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.experts import NAMES, MXFP4Experts
from tilelang_ext.kernels.mxfp4_moe.weights import HopperWeights, MXFP4Weights, tile_for_hopper

sys.path[:0] = [str(Path(__file__).resolve().parents[3] / "examples")]

import gpt_oss_moe  # noqa: E402

E, H, I, TOP_K, TOKENS = 5, 96, 64, 2, 7  # the last expert has no token
PREFIX = "model.layers.3.mlp.experts."
BOUNDS = {"dtype": "bfloat16", "max_error": 3e-2, "rms_error": 4e-3}


def checkpoint(seed=0, prefix="") -> dict[str, torch.Tensor]:
    """Every code and different scales in all rows and blocks; SwiGLU's limits are reached."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, rows, k in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        tensors |= {
            f"{prefix}{name}_blocks": torch.randint(256, (E, rows, k // 32, 16), generator=generator, dtype=torch.uint8),
            f"{prefix}{name}_scales": torch.randint(121, 127, (E, rows, k // 32), generator=generator, dtype=torch.uint8),
            f"{prefix}{name}_bias": torch.randn(E, rows, generator=generator).bfloat16(),
        }
    return tensors


def inputs(device="cpu"):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(TOKENS, H, generator=generator).bfloat16()
    router_indices = torch.stack([torch.randperm(E - 1, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    routing_weights = torch.rand(TOKENS, TOP_K, generator=generator)
    return x.to(device), router_indices.to(device), routing_weights.to(device)


def gpt_oss():
    """transformers' module of gpt-oss, imported where a test needs it, since that takes seconds."""
    from transformers.models.gpt_oss import modeling_gpt_oss

    return modeling_gpt_oss


def hf_experts(tensors):
    """transformers' module in float64, with the checkpoint's weights dequantised and transposed, as it loads them."""
    config = gpt_oss().GptOssConfig(
        num_local_experts=E, hidden_size=H, intermediate_size=I, num_experts_per_tok=TOP_K, experts_implementation="eager"
    )
    experts = gpt_oss().GptOssExperts(config).double()
    state = {}
    for name in ("gate_up_proj", "down_proj"):
        codes, scale = tensors[f"{name}_blocks"].flatten(-2), tensors[f"{name}_scales"]
        state[name] = reference.dequantize(codes, scale, E2M1, BlockScaledLayout.e8m0_k32()).mT
        state[f"{name}_bias"] = tensors[f"{name}_bias"]
    experts.load_state_dict(state)
    return experts


def expected():
    x, router_indices, routing_weights = inputs()
    with torch.no_grad():
        return hf_experts(checkpoint())(x.double(), router_indices, routing_weights.double())


def test_same_as_transformers():
    want = expected()
    assert_close(MXFP4Experts.from_checkpoint(checkpoint())(*inputs()), want, **BOUNDS)
    limited = hf_experts(checkpoint())
    limited.limit = 1e9
    with torch.no_grad():
        assert (limited(inputs()[0].double(), *inputs()[1:]) - want).abs().max() > 1  # the limit counts here


def test_in_a_model():
    """Two layers of gpt-oss in bfloat16, loaded by name: the error against float64 is hardly above that of its own experts."""
    sizes = {
        "num_hidden_layers": 2,
        "num_local_experts": E,
        "hidden_size": H,
        "intermediate_size": I,
        "num_experts_per_tok": TOP_K,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 8, "vocab_size": 64}
    config = gpt_oss().GptOssConfig(**sizes, **heads, attn_implementation="eager", experts_implementation="eager")
    torch.manual_seed(4)
    model, layers = gpt_oss().GptOssModel(config).eval(), [checkpoint(seed) for seed in range(2)]
    for layer, tensors in zip(model.layers, layers, strict=True):
        torch.nn.init.normal_(layer.mlp.router.weight, std=0.5)
        layer.mlp.experts.load_state_dict(hf_experts(tensors).state_dict())
    token_ids = torch.arange(20)[None] * 7 % 64

    def states(model):
        with torch.no_grad():
            return model(token_ids).last_hidden_state.double()

    want, theirs = states(copy.deepcopy(model).double()), states(model.bfloat16())
    for layer in model.layers:
        layer.mlp.experts = MXFP4Experts(E, H, I)
    by_name = {f"layers.{i}.mlp.experts.{name}": tensor for i, layer in enumerate(layers) for name, tensor in layer.items()}
    model.load_state_dict({**model.state_dict(), **by_name})
    error, their_error = ((result - want).square().mean().sqrt() for result in (states(model), theirs))
    assert error < 0.03
    assert error < 1.2 * their_error


@pytest.mark.cuda
@pytest.mark.parametrize("epilogue", ["reduce", "atomic"])
def test_same_as_transformers_on_a_gpu(epilogue):
    experts = MXFP4Experts.from_checkpoint(checkpoint(), epilogue=epilogue, device="cuda")
    assert_close(experts(*inputs("cuda")), expected(), **BOUNDS)
    moved = MXFP4Experts.from_checkpoint(checkpoint(), epilogue=epilogue).to("cuda")
    assert_close(moved(*inputs("cuda")), expected(), **BOUNDS)


def test_files(tmp_path):
    """One layer out of several, with its tensors in two files; only the tensors asked for are read."""
    tensors = checkpoint(prefix=PREFIX)
    names = sorted(tensors)
    files = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    save_file({name: tensors[name] for name in names[:2]} | checkpoint(1, "model.layers.2.mlp.experts."), files[0])
    save_file({name: tensors[name] for name in names[2:]} | {"lm_head.weight": torch.zeros(2)}, files[1])
    want = MXFP4Experts.from_checkpoint(checkpoint()).state_dict()
    for source in (files, [str(file) for file in files], tensors):
        got = MXFP4Experts.from_checkpoint(source, PREFIX).state_dict()
        assert all(torch.equal(got[name], want[name]) for name in NAMES)
    one = MXFP4Experts.from_checkpoint(files[0], "model.layers.2.mlp.experts.")
    assert torch.equal(one.down_proj_blocks, checkpoint(1)["down_proj_blocks"])
    with pytest.raises(KeyError, match=r"layers.3.*down_proj_scales must be .*pass every file of the layer"):
        MXFP4Experts.from_checkpoint(files[0], PREFIX)
    with pytest.raises(KeyError, match=r"got 13 tensors; pass a prefix such as 'model.layers.2.mlp.experts.'"):
        MXFP4Experts.from_checkpoint(files)


def test_state_dict_is_a_checkpoint():
    """It returns what was loaded, in a nested module too."""
    tensors = checkpoint()
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": MXFP4Experts(E, H, I)})})
    model.load_state_dict({f"mlp.experts.{name}": tensor for name, tensor in tensors.items()})
    state = model.state_dict()
    assert sorted(state) == sorted(f"mlp.experts.{name}" for name in NAMES)
    for name, tensor in tensors.items():
        assert torch.equal(state[f"mlp.experts.{name}"], tensor.float() if name.endswith("bias") else tensor)
        assert state[f"mlp.experts.{name}"].dtype == (torch.float32 if name.endswith("bias") else torch.uint8)
    experts = model["mlp"]["experts"]
    again = MXFP4Experts(E, H, I, device="meta")
    assert {buffer.device.type for buffer in again.buffers()} == {"meta"}
    again.load_state_dict(experts.state_dict(), assign=True)
    assert torch.equal(again(*inputs()), experts(*inputs()))


def test_moves_and_casts():
    """bfloat16 holds a checkpoint's biases, and bytes are no numbers to cast."""
    experts = MXFP4Experts.from_checkpoint(checkpoint())
    want = experts(*inputs())
    assert torch.equal(experts.to(torch.bfloat16)(*inputs()), want)
    assert {buffer.device.type for buffer in experts.to("meta").buffers()} == {"meta"}


def test_weights_are_prepared_once(monkeypatch):
    """They are not prepared in each call, but again after a load, and after a cast or a move replaced the buffers."""
    prepared, prepare = [], module_of_experts.prepare_mxfp4_weights
    monkeypatch.setattr(
        module_of_experts, "prepare_mxfp4_weights", lambda *a, **options: prepared.append(0) or prepare(*a, **options)
    )
    experts = MXFP4Experts.from_checkpoint(checkpoint())
    first = experts(*inputs())
    assert torch.equal(experts(*inputs()), first)
    assert len(prepared) == 2
    experts.load_state_dict(checkpoint(1))
    other = experts(*inputs())
    assert len(prepared) == 4
    assert torch.equal(other, MXFP4Experts.from_checkpoint(checkpoint(1))(*inputs()))
    assert not torch.equal(other, first)
    assert torch.equal(copy.deepcopy(experts)(*inputs()), other)
    prepared.clear()
    experts.bfloat16()(*inputs())
    assert len(prepared) == 2


def test_tiles_on_hopper(monkeypatch):
    """On a GPU of capability 9.0 both weights are tiled, but those of experts whose scales tiles cannot hold."""
    x = types.SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16)
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    tiles_for = module_of_experts._tiles_for
    assert tiles_for(x, None) == tiles_for(x, torch.bfloat16) == "bfloat16"
    assert tiles_for(x, "fp8") == tiles_for(x, torch.float8_e4m3fn) == "fp8"
    assert tiles_for(x, "mxfp8") is None
    assert tiles_for(types.SimpleNamespace(device=x.device, dtype=torch.float16), None) is None
    assert tiles_for(torch.zeros(1).bfloat16(), None) is None
    capability[0] = (8, 0)
    assert tiles_for(x, None) is None

    given = []
    monkeypatch.setattr(module_of_experts, "_tiles_for", lambda x, a_dtype: a_dtype or "bfloat16")
    monkeypatch.setattr(
        module_of_experts, "mxfp4_moe", lambda x, ids, weights, w13, w2, **options: given.append((w13, w2, options)) or x
    )
    experts = MXFP4Experts.from_checkpoint(checkpoint())
    experts(*inputs())
    experts(*inputs())
    want = tile_for_hopper(experts.w13), tile_for_hopper(experts.w2)
    for tiled, same in zip(given[0][:2], want, strict=True):
        assert isinstance(tiled, HopperWeights)
        assert torch.equal(tiled.tiles, same.tiles)
        assert torch.equal(tiled.bias, same.bias)
    assert given[1][0] is given[0][0]
    large = checkpoint()
    large["down_proj_scales"][1, 0, 0] = 130
    experts.load_state_dict(large)
    experts(*inputs())
    assert all(isinstance(weights, HopperWeights) and weights.num_experts == E - 1 for weights in given[2][:2])
    assert torch.equal(given[2][0].tiles, want[0].tiles[torch.arange(E) != 1])
    assert all(isinstance(weights, MXFP4Weights) and weights.num_experts == 1 for weights in given[3][:2])
    assert torch.equal(given[2][2]["expert_mask"], torch.arange(E) != 1)
    assert torch.equal(given[3][2]["expert_mask"], torch.arange(E) == 1)
    experts.a_dtype = "fp8"
    experts(*inputs())
    assert torch.equal(given[4][0].tiles, tile_for_hopper(experts.w13, a_dtype="fp8").tiles)
    assert given[4][1].row_scale.shape == given[4][1].bias.shape


def test_scales_that_spread(monkeypatch):
    """FP8 experts with scales too far apart run in bfloat16, where one is too large for that as they are; results are added."""
    tensors = checkpoint()
    tensors["down_proj_blocks"][1:3, 0] = 0x71  # 0.5 and 6 in each group
    tensors["down_proj_scales"][1:3, 0, :2] = torch.tensor([100, 120], dtype=torch.uint8)
    tensors["gate_up_proj_scales"][2, 0, 0] = 130
    experts = MXFP4Experts.from_checkpoint(tensors, a_dtype="fp8")
    given, moe = [], module_of_experts.mxfp4_moe

    def noted(*arguments, **options):
        given.append((arguments[3].num_experts, options["a_dtype"]))
        return moe(*arguments, **options)

    monkeypatch.setattr(module_of_experts, "mxfp4_moe", noted)
    monkeypatch.setattr(module_of_experts, "_tiles_for", lambda x, a_dtype: "fp8")
    tile = module_of_experts.tile_for_hopper
    monkeypatch.setattr(module_of_experts, "tile_for_hopper", lambda w, a_dtype: tile(w, a_dtype=a_dtype) and w)
    x, router_indices, routing_weights = inputs()
    remote = torch.tensor([True, False] * 2 + [True] * (E - 2) + [False])  # of experts whose weights are here
    places = remote.nonzero().flatten()
    masks = (None, router_indices), (remote, places[router_indices])
    for mask, indices in masks:
        given.clear()
        result = experts(x, indices, routing_weights, expert_mask=mask)
        assert given == [(E - 2, "fp8"), (1, None), (1, "fp8")]
        parts = []
        for keep, a_dtype in ((torch.arange(E) % 3 == 0, "fp8"), (torch.arange(E) == 1, None), (torch.arange(E) == 2, "fp8")):
            options = {"activation": Activation(), "a_dtype": a_dtype}
            weights = [torch.where(keep[router_indices], routing_weights, 0)]
            parts.append(moe(x, router_indices, *weights, experts.w13, experts.w2, **options).double())
        assert_close(result, sum(parts), dtype="bfloat16")


def test_shapes_of_forward():
    x, router_indices, routing_weights = inputs()
    experts = MXFP4Experts.from_checkpoint(checkpoint(), epilogue="atomic")
    want = experts(x, router_indices, routing_weights)
    batched = experts(x[None], router_indices[None].int(), routing_weights[None])
    assert torch.equal(batched, want[None])
    assert experts(x[:0], router_indices[:0], routing_weights[:0]).shape == (0, H)
    mask = torch.tensor([False] * 2 + [True] * E)
    assert torch.equal(experts(x, router_indices + 2, routing_weights, expert_mask=mask), want)


def test_scales_as_torch_has_them():
    tensors = checkpoint()
    want = MXFP4Experts.from_checkpoint(tensors)(*inputs())
    tensors = {name: t.view(torch.float8_e8m0fnu) if name.endswith("scales") else t for name, t in tensors.items()}
    assert torch.equal(MXFP4Experts.from_checkpoint(tensors)(*inputs()), want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"down_proj_bias": None}, KeyError, "down_proj_bias must be in the checkpoint; got 5 tensors; pass every file"),
        ({"down_proj_blocks": torch.zeros(E, H, I // 2)}, ValueError, "layer.down_proj_blocks must be .E, rows, K / 32, 16."),
        ({"down_proj_scales": torch.zeros(E, H, 1, dtype=torch.uint8)}, ValueError, "down_proj_scales must have shape"),
        ({"gate_up_proj_bias": torch.zeros(E, I)}, ValueError, "gate_up_proj_bias must have shape"),
        (
            {"down_proj_scales": torch.zeros(E, H, I // 32)},
            TypeError,
            "down_proj_scales: must be uint8 or torch.float8_e8m0fnu",
        ),
        ({"down_proj_bias": torch.zeros(E, H, dtype=torch.uint8)}, TypeError, "down_proj_bias must be a float tensor"),
    ],
)
def test_errors_of_checkpoints(change, error, message):
    tensors = {f"layer.{name}": tensor for name, tensor in (checkpoint() | change).items() if tensor is not None}
    with pytest.raises(error, match=message):
        MXFP4Experts.from_checkpoint(tensors, "layer.")


def test_errors():
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 32; got 100"):
        MXFP4Experts(E, 100, I)
    with pytest.raises(ValueError, match="num_experts must be at least 1"):
        MXFP4Experts(0, H, I)
    experts, tensors = MXFP4Experts(E, H, 2 * I), checkpoint()
    with pytest.raises(RuntimeError, match="size mismatch for gate_up_proj_blocks"):
        experts.load_state_dict(tensors)
    with pytest.raises(RuntimeError, match=r"Missing key.*down_proj_scales"):
        MXFP4Experts(E, H, I).load_state_dict({name: t for name, t in tensors.items() if name != "down_proj_scales"})


def test_is_traced_whole():
    experts, operands = MXFP4Experts.from_checkpoint(checkpoint()), inputs()
    traced = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for tokens in (TOKENS, 3):
        given = [operand[:tokens] for operand in operands]
        assert torch.equal(traced(*given), experts(*given))


@pytest.mark.parametrize("a_dtype", ["mxfp8", torch.float4_e2m1fn_x2])
def test_options_reach_the_operator(a_dtype):
    operands = inputs()
    experts = MXFP4Experts.from_checkpoint(checkpoint(), a_dtype=a_dtype, activation=Activation("silu"))
    want = operator.mxfp4_moe(*operands, experts.w13, experts.w2, activation=Activation("silu"), a_dtype=a_dtype)
    assert torch.equal(experts(*operands), want)
    assert not torch.equal(MXFP4Experts.from_checkpoint(checkpoint(), activation=Activation("silu"))(*operands), want)
    with pytest.raises(ValueError, match="epilogue must be one of"):
        MXFP4Experts.from_checkpoint(checkpoint(), epilogue="sum")(*operands)


def example_cosine(capsys, *arguments):
    gpt_oss_moe.main([str(argument) for argument in arguments])
    return float(re.search(r"at least ([\d.]+)", capsys.readouterr().out).group(1))


@pytest.mark.parametrize(("a_dtype", "least"), [("bfloat16", 0.9999), ("fp8", 0.998), ("mxfp4", 0.95)])
def test_example(capsys, a_dtype, least):
    cosine = example_cosine(capsys, "--a-dtype", a_dtype, "--tokens", 5, "--device", "cpu")
    assert least < cosine < (1.00001 if a_dtype == "bfloat16" else 0.9995)


def test_example_reads_checkpoints(capsys, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(checkpoint(prefix=PREFIX), file)
    assert example_cosine(capsys, "--checkpoint", file, "--layer", 3, "--top-k", 2, "--device", "cpu") > 0.9999
    with pytest.raises(KeyError, match=r"pass a prefix such as 'model.layers.3.mlp.experts.'"):
        gpt_oss_moe.main(["--checkpoint", str(file)])


# --- every way to load -----------------------------------------------------------------------------------------------


class TwoLayers(torch.nn.Module):
    """Experts inside of a model, as transformers' from_pretrained fills them."""

    def __init__(self, device=None):
        super().__init__()
        self.layers = torch.nn.ModuleList(MXFP4Experts(E, H, I, device=device) for _ in range(2))


def layers_of(tensors) -> dict:
    return {f"layers.{i}.{name}": tensor for i in range(2) for name, tensor in tensors[i].items()}


def by_load_state_dict(tensors, folder):
    model = TwoLayers()
    model.load_state_dict(layers_of(tensors))
    return model


def by_assignment(tensors, folder):
    model = TwoLayers(device="meta")
    model.load_state_dict(layers_of(tensors), assign=True)
    return model


def by_safetensors(tensors, folder):
    save_file(layers_of(tensors), folder / "model.safetensors")
    model = TwoLayers()
    load_model(model, folder / "model.safetensors")
    return model


def by_a_saved_state_dict(tensors, folder):
    torch.save(by_load_state_dict(tensors, folder).state_dict(), folder / "model.pt")
    model = TwoLayers()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return model


def by_a_saved_module(tensors, folder):
    torch.save(by_load_state_dict(tensors, folder), folder / "module.pt")
    return torch.load(folder / "module.pt", weights_only=False)


def by_copying_into_buffers(tensors, folder):
    """No hook of the module runs, as in loaders that write to the buffers."""
    model = TwoLayers()
    for name, buffer in model.named_buffers():
        buffer.copy_(layers_of(tensors)[name])
    return model


def by_from_pretrained(tensors, folder):
    """transformers' loader, which calls no hook of the module either."""
    config = gpt_oss().GptOssConfig(
        num_hidden_layers=2, num_local_experts=E, hidden_size=H, intermediate_size=I, num_experts_per_tok=TOP_K, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, pad_token_id=0,
    )  # fmt: skip

    class WithMXFP4(gpt_oss().GptOssModel):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.layers:
                layer.mlp.experts = MXFP4Experts(E, H, I)

    model = WithMXFP4(config)
    for layer, own in zip(model.layers, tensors, strict=True):
        layer.mlp.experts.load_state_dict(own)
    model.save_pretrained(folder)
    loaded = TwoLayers()
    loaded.layers = torch.nn.ModuleList(layer.mlp.experts for layer in WithMXFP4.from_pretrained(folder).layers)
    return loaded


@pytest.mark.parametrize(
    "load",
    [
        by_load_state_dict,
        by_assignment,
        by_safetensors,
        by_a_saved_state_dict,
        by_a_saved_module,
        by_copying_into_buffers,
        by_from_pretrained,
    ],
)
def test_every_way_to_load(load, tmp_path):
    """Rows of gate and up alternate in checkpoints: whoever separates them in a hook alone gets other experts' numbers."""
    tensors = [checkpoint(seed) for seed in (3, 4)]
    model = load(tensors, tmp_path)
    for layer, own in zip(model.layers, tensors, strict=True):
        want = MXFP4Experts.from_checkpoint(own)(*inputs())
        assert torch.equal(layer(*inputs()), want)
        assert torch.equal(copy.deepcopy(layer)(*inputs()), want)
        assert torch.equal(layer.to(torch.float64).to("cpu")(*inputs()), want)


def test_weights_written_in_place_are_prepared_again():
    """A loader that writes to the buffers after a call."""
    experts = MXFP4Experts.from_checkpoint(checkpoint(3))
    experts(*inputs())
    with torch.no_grad():
        for name, tensor in checkpoint(4).items():
            getattr(experts, name).copy_(tensor)
    assert torch.equal(experts(*inputs()), MXFP4Experts.from_checkpoint(checkpoint(4))(*inputs()))


def test_a_file_has_the_weights_once():
    """What is prepared from the buffers is prepared again, not stored."""
    experts, sizes = MXFP4Experts.from_checkpoint(checkpoint()), []
    for _ in range(2):
        file = io.BytesIO()
        torch.save(experts, file)
        sizes.append(file.tell())
        experts(*inputs())
    assert sizes[0] == sizes[1]


def test_backward_raises():
    experts = MXFP4Experts.from_checkpoint(checkpoint())
    x, ids, weights = inputs()
    with pytest.raises(NotImplementedError, match="mxfp4_moe: has no gradient; got a backward pass through its result"):
        (experts(x.requires_grad_(), ids, weights) * 2).sum().backward()
    with pytest.raises(NotImplementedError, match="mxfp4_moe: has no gradient"):
        experts(x.detach(), ids, weights.requires_grad_()).sum().backward()
    with torch.no_grad():
        assert not experts(x, ids, weights).requires_grad
