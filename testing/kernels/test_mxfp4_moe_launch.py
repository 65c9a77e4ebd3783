"""What the launches of `mxfp4_moe` keep between calls."""

import torch

from tilelang_ext.kernels import mxfp4_moe_launch as launch


def test_mask_of_every_expert_is_made_once(monkeypatch):
    """A graph's own mask lives in the graph's memory: it is not kept, while one that is kept serves graphs too."""

    class Ones:
        def to(self, device):
            return self

    capturing, device = False, torch.device("cuda", 0)
    monkeypatch.setattr(launch, "_MASKS", {})
    monkeypatch.setattr(torch, "ones", lambda *size, dtype, device=None: Ones())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    capturing = True
    of_graph = launch._every_expert(8, device)
    assert isinstance(of_graph, Ones)
    capturing = False
    kept = launch._every_expert(8, device)
    assert kept is not of_graph
    assert launch._every_expert(8, device) is kept
    assert launch._every_expert(9, device) is not kept
    capturing = True
    assert launch._every_expert(8, device) is kept


def test_mask_of_every_expert():
    mask = launch._every_expert(5, torch.device("cpu"))
    assert torch.equal(mask, torch.ones(5, dtype=torch.int32))
    assert mask.dtype == torch.int32
