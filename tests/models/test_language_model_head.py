"""The loss of a model whose head is more than a matrix: that of its own logits, for every method."""

import pytest
import torch
from torch.nn import functional as F

import kvtrain
from kvtrain.kernels.distillation import TeacherHead
from kvtrain.losses.distillation import Distillation
from tests.hosts import make_host, random_ids
from tests.kernels.test_head import LowRank

METHODS = {
    "full": kvtrain.Full(),
    "dmc": kvtrain.DMC(init_bias=0.0),
    "lckv": kvtrain.LCKV(kv_map="lckv-w2"),
    "duo": kvtrain.Duo(sink=1, recent=3, full_heads=((0,), (), (1,), ())),
}


def with_low_rank(model):
    model.lm_head = LowRank(model.lm_head)
    return model


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_on_the_head_learns(name):
    model = with_low_rank(kvtrain.retrofit(make_host(layers=4), METHODS[name])).train()
    ids = random_ids(2, 11)
    leaves = [model.lm_head.down, model.lm_head.up, model.model.layers[0].self_attn.q_proj.weight]
    output = model(ids, labels=ids, skip_logits=False)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=1e-12)
    found, right = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (output.loss, expected))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    assert all(grad.abs().max() > 0 for grad in found)


def test_a_teacher_with_an_adapter_teaches_with_it():
    student, teacher = (kvtrain.retrofit(make_host(seed=seed), kvtrain.Full()) for seed in (0, 1))
    ids = random_ids(2, 9)
    with_low_rank(teacher)
    with torch.no_grad():
        hidden = teacher.model(ids, use_cache=False).last_hidden_state
        logits = [model(ids, use_cache=False).logits[:, :-1] for model in (teacher, student)]
    told = {"teacher": TeacherHead(hidden, teacher.lm_head), "distillation": Distillation()}
    true, own = (torch.log_softmax(each, -1) for each in logits)
    expected = (true.exp() * (true - own)).sum(-1).mean()
    torch.testing.assert_close(student(ids, labels=ids, **told).loss.detach(), expected, rtol=1e-12, atol=1e-12)
