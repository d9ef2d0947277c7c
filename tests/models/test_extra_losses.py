"""Losses of a host's family join that of the tokens: routers of families with experts, and the hosts' own formula."""

import copy
import pickle

import pytest
import torch

import kvtrain
from kvtrain.kernels.distillation import TeacherHead
from tests.hosts import EXPERT_FAMILIES, EXPERTS, exact, make_host, random_ids

COEFFICIENT, COUNT, CHOSEN = (EXPERTS[name] for name in ("router_aux_loss_coef", "num_experts", "num_experts_per_tok"))
METHODS = [kvtrain.Full(), kvtrain.DMC(), kvtrain.LCKV(kv_map="2_2_2"), kvtrain.LCKV(kv_map="0_0_2")]


def make_experts(dtype=torch.float64, family="qwen3_moe", **settings):
    return make_host(family, layers=3, dtype=dtype, **settings)


def naive_balance(model, run, real):
    """Expert by expert and token by token, from what every router gives last; ``run`` runs the model."""
    seen = {}
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, output, idx=idx: seen.update({idx: output[0]}))
        for idx, layer in enumerate(model.model.layers)
    ]
    result = run()
    for hook in hooks:
        hook.remove()
    rows = [row for logits in seen.values() for row, counts in zip(logits, real.flatten(), strict=True) if counts]
    total = 0.0
    for expert in range(COUNT):
        shares = [torch.softmax(row, -1)[expert] for row in rows]
        chosen = [float(expert in row.topk(CHOSEN).indices) for row in rows]
        total = total + sum(chosen) / len(rows) * sum(shares) / len(rows)
    return COUNT * total, result


def make_batch():
    """Two packed rows, the second of which ends in padding, and labels of some tokens."""
    ids, documents = random_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    documents[0, 6:], documents[1, 9:] = 2, 0
    labels = ids.masked_fill((documents == 0) | (torch.arange(14) % 3 == 0), -100)
    return ids, documents, labels


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_it_is_the_naive_formula_times_the_hosts_coefficient(method, checkpointing):
    model = kvtrain.retrofit(make_experts(), method).train()
    ids, documents, labels = make_batch()
    arguments = {"labels": labels, "document_ids": documents}
    if checkpointing:
        model.gradient_checkpointing_enable()
    balance, output = naive_balance(model, lambda: model(ids, **arguments), documents > 0)
    parts = output.loss_parts
    assert list(parts) == ["cross_entropy", "aux_loss"] and not parts["aux_loss"].requires_grad
    torch.testing.assert_close(parts["aux_loss"], balance.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(output.loss, parts["cross_entropy"] + COEFFICIENT * balance, rtol=1e-6, atol=0)
    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    weights = [*routers, model.model.embed_tokens.weight]
    alone = torch.autograd.grad(balance, weights, retain_graph=True)
    assert all(grad.abs().max() > 1e-5 for grad in alone)
    model.extra_losses = ()
    without = torch.autograd.grad(model(ids, **arguments).loss, weights)
    together = torch.autograd.grad(output.loss, weights)
    for both, tokens, extra in zip(together, without, alone, strict=True):
        torch.testing.assert_close(both, tokens + COEFFICIENT * extra, rtol=1e-4, atol=1e-7)  # routers are float32


@pytest.mark.parametrize(
    ("family", "settings"),
    [*((family, {}) for family in EXPERT_FAMILIES), ("qwen3_moe", {"mlp_only_layers": [1]})],
    ids=[*EXPERT_FAMILIES, "a dense layer"],
)
def test_it_and_its_gradient_are_the_hosts_own(family, settings):
    """transformers: ``aux_loss`` where ``output_router_logits=True``."""
    host = make_experts(family=family, **settings)
    ids, mask = random_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    arguments = {"labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    same, model = exact(host), kvtrain.retrofit(host, kvtrain.Full()).train()
    expected, output = same(ids, output_router_logits=True, **arguments), model(ids, **arguments)
    assert output.loss_parts["aux_loss"].item() == pytest.approx(expected.aux_loss.item(), rel=1e-6)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    names = [name for name, _ in host.named_parameters() if "mlp.gate" in name or "embed" in name or "experts" in name]
    hosts = torch.autograd.grad(expected.aux_loss, [same.get_parameter(name) for name in names], allow_unused=True)
    model.extra_losses = ()
    weights = [model.get_parameter(name) for name in names]
    total = torch.autograd.grad(output.loss, weights)
    tokens = torch.autograd.grad(model(ids, **arguments).loss, weights)
    for host_grad, with_it, without in zip(hosts, total, tokens, strict=True):
        own = (with_it - without) / COEFFICIENT
        expected_grad = torch.zeros_like(own) if host_grad is None else host_grad  # the last layer's experts
        torch.testing.assert_close(own, expected_grad, rtol=1e-6, atol=1e-6 * max(map(_largest, hosts)))


def _largest(grad):
    return 0.0 if grad is None else grad.abs().max().item()


def test_weights_of_ragged_batches_add_up_to_the_coefficient():
    """Whatever the loss is divided by: batches that share a number of targets share the coefficient likewise."""
    model = kvtrain.retrofit(make_experts(), kvtrain.Full()).train()
    ids, documents, labels = make_batch()
    rows = [{"input_ids": ids[row : row + 1], "document_ids": documents[row : row + 1]} for row in (0, 1)]
    labels = [labels[:1], labels[1:]]
    means = [model(**row, labels=label).loss_parts for row, label in zip(rows, labels, strict=True)]
    counts = [int((label[:, 1:] != -100).sum()) for label in labels]
    assert counts[0] != counts[1] and not torch.allclose(means[0]["aux_loss"], means[1]["aux_loss"])
    items = sum(counts)
    total = sum(
        model(**row, labels=label, num_items_in_batch=items).loss for row, label in zip(rows, labels, strict=True)
    )
    expected = sum(
        count / items * (part["cross_entropy"] + COEFFICIENT * part["aux_loss"])
        for count, part in zip(counts, means, strict=True)
    )
    torch.testing.assert_close(total.detach(), expected)
    padding = {"input_ids": ids[:1], "document_ids": torch.zeros_like(documents[:1])}
    nothing = model(**padding, labels=torch.full_like(ids[:1], -100), num_items_in_batch=items).loss
    assert nothing == 0


def test_a_teacher_s_divergence_has_it_beside_it():
    model = kvtrain.retrofit(make_experts(), kvtrain.Full()).train()
    ids = random_ids(2, 12)
    hidden = model.model(ids, use_cache=False).last_hidden_state.detach() + 0.1
    output = model(ids, labels=ids, teacher=TeacherHead(hidden, model.lm_head))
    assert list(output.loss_parts) == ["divergence", "aux_loss"]
    expected = output.loss_parts["divergence"] + COEFFICIENT * output.loss_parts["aux_loss"]
    torch.testing.assert_close(output.loss.detach(), expected)


def test_who_does_not_learn_by_it_does_not_have_it():
    """Evaluation, a coefficient of 0 and frozen routers measure and learn from the tokens alone."""
    ids = random_ids(2, 12)
    model = kvtrain.retrofit(make_experts(), kvtrain.Full())
    expected = model(ids, labels=ids, use_cache=False).loss
    off = kvtrain.retrofit(make_experts(router_aux_loss_coef=0.0), kvtrain.Full()).train()
    frozen = kvtrain.retrofit(make_experts(), kvtrain.Full()).train()
    for layer in frozen.model.layers:
        layer.mlp.gate.requires_grad_(False)
    for same in (off, frozen):
        output = same(ids, labels=ids)
        assert output.loss_parts is None
        torch.testing.assert_close(output.loss, expected)
    assert model.train()(ids, labels=ids).loss > expected
    assert off.extra_losses == () and "extra_losses" in vars(off)


def test_models_with_it_are_copied_pickled_and_not_checkpointed_reentrantly():
    model, ids = kvtrain.retrofit(make_experts(torch.float32), kvtrain.Full()).train(), random_ids(1, 9)
    expected, again = model(ids, labels=ids).loss, copy.deepcopy(model)
    assert torch.equal(again(ids, labels=ids).loss, expected)
    again.extra_losses, again.model.layers[0].mlp = pickle.loads(
        pickle.dumps((model.extra_losses, model.model.layers[0].mlp))  # a planted class cannot be imported by name
    )
    assert torch.equal(again(ids, labels=ids).loss, expected)
    with pytest.raises(ValueError, match="reentrant checkpointing loses gradients of this model"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
