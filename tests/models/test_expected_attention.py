"""Expected attention besides its scores: angles and queries as hosts have them, moments, and what is refused."""

from dataclasses import replace

import pytest
import torch

import kvtrain
from kvtrain.kernels.rope import rotary_angles
from kvtrain.models.eviction.observation import NewQueries
from tests.hosts import FAMILIES, make_host, random_ids

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = [{"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, YARN]
POLICY = kvtrain.ExpectedAttention(budget=9, recent=0, num_future=16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_caches_rotate_as_the_host_does(family, rope):
    model = kvtrain.retrofit(make_host(family, rope_parameters=rope), POLICY)
    positions = torch.tensor([[0, 1, 700], [3, 90_000, 5]])
    for layer in model.make_cache().layers:
        expected = model.model.rotary_emb(torch.empty(1, dtype=torch.float64), positions)
        for ours, theirs in zip(layer.angles(positions), expected, strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_queries_before_rotation_are_the_projections(monkeypatch):
    """Of an attention that yarn scales, in blocks."""
    policy, seen = replace(POLICY, budget=5, every=4, prompt="blocks"), []
    model, ids = kvtrain.retrofit(make_host(rope_parameters=YARN, layers=1), policy), random_ids(1, 12)
    monkeypatch.setattr(kvtrain.ExpectedAttention, "observe_queries", lambda self, layer, new: seen.append(new))
    attention, hidden = model.model.layers[0].self_attn, []
    attention.q_proj.register_forward_hook(lambda _, inputs, output: hidden.append(output))
    model(ids, past_key_values=model.make_cache(), prefill=True)
    expected = attention.split_heads(hidden[0])
    before = torch.cat([new.before_rotation() for new in seen], 2)
    torch.testing.assert_close(before, expected, atol=1e-12, rtol=0)
    assert len(seen) > 1 and not torch.allclose(torch.cat([new.rotated for new in seen], 2), expected)


def test_moments_survive_chunks_and_large_means():
    """In float32; a sum of squares would lose what differs from a mean of a thousand."""
    cache = kvtrain.retrofit(make_host(dtype=torch.float32), POLICY).make_cache()
    cache.admit(2)
    layer, generator = cache.layers[0], torch.Generator().manual_seed(0)
    queries = 1000 + torch.randn(2, 4, 90, 8, generator=generator)
    positions = torch.arange(90).expand(2, -1).clone()
    positions[1] = (positions[1] - 30).clamp(min=-1)  # a row of 60
    for part, at in zip(queries.split([50, 1, 39], 2), positions.split([50, 1, 39], 1), strict=True):
        angles = rotary_angles(torch.zeros(4), at, torch.float32)  # at rest
        POLICY.observe_queries(layer, NewQueries(part, angles, at, 0.5))
    assert layer.state["query_count"].tolist() == [86, 56]
    for row, first in enumerate((4, 34)):
        sample = queries[row, :, first:].double() * 0.5  # behind the sink
        torch.testing.assert_close(layer.state["query_mean"][row].double(), sample.mean(1), atol=1e-3, rtol=0)
        covariance = torch.stack([head.T.cov(correction=0) for head in sample])
        ours = layer.state["query_scatter"][row].double() / len(sample[0])
        torch.testing.assert_close(ours, covariance, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("setting", "value"), [("num_future", 0), ("epsilon", -0.1)])
def test_mistakes_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        kvtrain.ExpectedAttention(**{setting: value})
