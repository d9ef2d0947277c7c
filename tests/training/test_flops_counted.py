"""Our sums of operations against torch's counter, which looks at what runs."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kvtrain
from kvtrain.kernels.distillation import TeacherHead
from kvtrain.models.duo.attention import DuoStep
from kvtrain.training.flops import training_flops
from tests.hosts import EXPERT_FAMILIES, make_host, random_ids

ROWS, LENGTH = 2, 128
TOKENS = ROWS * LENGTH


def flash_flops(query, key, value, dropout, causal, *, out_val, **_):
    """Scores and their sums of values, of which causality halves both."""
    return 4 * query.shape[:3].numel() * key.shape[2] * query.shape[3] // (2 if causal else 1)


def flash_backward_flops(grad, query, key, value, output, lse, dropout, causal, *, out_val, **_):
    """Twice the forward pass; scores computed once more are the kernel's own affair, as in our sums."""
    return 2 * flash_flops(query, key, value, dropout, causal, out_val=None)


flash_flops._get_raw = flash_backward_flops._get_raw = True
aten = torch.ops.aten
FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: flash_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_backward_flops,
}


def count(step):
    """Operations of a token in a training step."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        step().backward()
    return counter.get_total_flops() / TOKENS


def loss_of(model, **arguments):
    """Of a batch in which every token has a target."""
    ids = random_ids(ROWS, LENGTH)
    return model(ids, shift_labels=ids, **arguments).loss


def retrofitted(method=None, **host):
    return kvtrain.retrofit(make_host(dtype=torch.float32, **host), method or kvtrain.Full()).train()


def with_experts(family, **settings):
    """Expert by expert, in products that the counter knows, and without the few of the routers' loss."""
    host = make_host(family, dtype=torch.float32, router_aux_loss_coef=0.0, **settings)
    host.set_experts_implementation("eager")
    return kvtrain.retrofit(host, kvtrain.Full()).train()


def transnormer(variant):
    settings = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    settings |= {"intermediate_size": 96, "block_size": 32, "variant": variant}
    return kvtrain.TransNormerForCausalLM(kvtrain.TransNormerConfig(**settings)).train()


# What runs beside what our sums hold, as a share of them: least and most. At a width of 32 or 64 it is large.
EXACT = (0.0, 0.0)
POOLING = (0.10, 0.15)  # a band of decisions times keys and values; 0.025 of the packaged model at a width of 256
SINKS = (0.20, 0.26)  # a log-sum-exp with a gradient takes attention's backward pass to dense chunks
CHUNKS = (0.12, 0.20)  # tokens of a chunk see each other densely, and gradients of a scan are three scans


@pytest.mark.parametrize(
    ("model", "beside"),
    [
        (retrofitted, EXACT),
        *((functools.partial(with_experts, family), EXACT) for family in EXPERT_FAMILIES),
        (functools.partial(with_experts, "gpt_oss"), SINKS),
        (lambda: retrofitted(family="qwen3", layers=3, tie_word_embeddings=True), EXACT),
        (
            lambda: kvtrain.retrofit(kvtrain.convert_gqa(make_host(dtype=torch.float32), 1), kvtrain.Full()).train(),
            EXACT,
        ),
        (lambda: retrofitted(kvtrain.LCKV(kv_map="0_0_2_2"), layers=4), EXACT),
        (lambda: retrofitted(kvtrain.DMC()), POOLING),
        (lambda: transnormer("T1"), CHUNKS),
        (lambda: transnormer("T2"), CHUNKS),
    ],
    ids=[
        "full",
        *(family for family in EXPERT_FAMILIES),
        "gpt_oss",
        "qwen3",
        "gqa",
        "lckv-once",
        "dmc",
        "t1",
        "t2",
    ],
)
def test_what_runs_is_what_is_counted(model, beside):
    model = model()
    ours, counted = training_flops(model, LENGTH), count(lambda: loss_of(model))
    assert ours.model == ours.hardware
    assert beside[0] <= counted / ours.model - 1 <= beside[1]


@pytest.mark.parametrize("passes", [(2, 2), (3, 2), (7, 2), (3, 4)], ids=str)
def test_layers_that_iterate_are_the_hardware_s_as_often_as_they_run(passes):
    """All but the last layer's keys and values in every pass but the last, and gradients of those that none has."""
    forward, backward = passes
    method = kvtrain.LCKV(kv_map="0_2_2_3", forward_passes=forward, backward_passes=backward)
    model = retrofitted(method, layers=4)
    ours, counted = training_flops(model, LENGTH), count(lambda: loss_of(model))
    assert ours.hardware > 1.3 * ours.model
    assert counted == pytest.approx(ours.hardware, rel=0.03)


def test_checkpointing_runs_all_of_a_layer_again_but_its_last_product():
    model = retrofitted()
    model.gradient_checkpointing_enable()
    last = sum(2 * layer.mlp.down_proj.weight.numel() for layer in model.model.layers)
    assert count(lambda: loss_of(model)) == training_flops(model, LENGTH).hardware - last


def test_frozen_experts_have_no_gradient_of_their_own():
    model = with_experts("qwen3_moe", mlp_only_layers=[1])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    assert count(lambda: loss_of(model)) == training_flops(model, LENGTH).model


def test_a_teacher_s_own_size_counts():
    model, teacher = retrofitted(kv_heads=1), retrofitted(kv_heads=4, seed=1).requires_grad_(False)

    def step():
        hidden = teacher.model(random_ids(ROWS, LENGTH), use_cache=False).last_hidden_state
        return loss_of(model, teacher=TeacherHead(hidden, teacher.lm_head))

    assert count(step) == training_flops(model, LENGTH, teacher=teacher).hardware


def test_gates_that_train_attend_twice():
    """A window beside everything, for each head, is what the method adds."""
    model = retrofitted(kvtrain.Duo(sink=4, recent=60))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("gates"))
    step = DuoStep(step=0)
    counted = count(lambda: loss_of(model, step=step))
    ours = training_flops(model, LENGTH).hardware
    assert 0.01 < counted / ours - 1 < 0.03
