"""Adapters during a retrofit: what trains, what stays to the bit, who teaches, and what an export makes of both."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvtrain
from kvtrain.errors import UsageError
from kvtrain.export.hf import export_run
from kvtrain.models.adapters import LoRA, OwnRows, base_layers, is_adapter, own_rows, plain_name
from kvtrain.models.checkpoint import read_checkpoint
from kvtrain.training import DMCModule, DMSModule, DuoModule, LCKVModule, Phase, RetrofitModule
from tests.hosts import FAMILIES, VOCAB, make_host, random_ids

from .tiny_runs import make_rows, table, train

pytest.importorskip("peft")

DMC = kvtrain.DMC(compression=2.0, window=4, init_bias=1.0)
CHANNEL = kvtrain.DMS(compression=4.0, window=4, init_bias=1.0, decide_by="query_channel", trainable="all")
BORROWED = (("zero_out", 3), ("retrofit", 3), ("finetune", 3))
# Family of the base, module, its settings, phases, and whether it teaches itself.
CASES = {
    "full": ("llama", RetrofitModule, {}, (("all", 9),), False),
    "gqa": ("llama", RetrofitModule, {"distill": True, "num_key_value_heads": 1}, (("all", 9),), False),
    "dmc": ("qwen2", DMCModule, {"distill": True, "method": DMC}, BORROWED, False),
    "dms": ("qwen3", DMSModule, {"method": kvtrain.DMS(compression=4.0, window=4, init_bias=1.0)}, BORROWED[1:], True),
    "dms, channel": ("qwen3", DMSModule, {"method": CHANNEL}, BORROWED, False),
    "lckv": ("llama", LCKVModule, {"distill": True, "method": kvtrain.LCKV(kv_map="cla2")}, (("all", 9),), False),
    "duo": ("llama", DuoModule, {"method": kvtrain.Duo(sink=2, recent=4)}, (("gates", 9),), True),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for family in ("llama", "qwen2", "qwen3"):
        make_host(family, dtype=torch.float32, layers=4).save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def wide_bases(tmp_path_factory):
    """With rows of 64 numbers."""
    folder, shape = tmp_path_factory.mktemp("wide"), {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    for family in ("llama", "qwen2"):
        config = FAMILIES[family](
            hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=VOCAB, bos_token_id=1, **shape
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / family)
    return folder


def module_of(name, bases, learning_rate=1e-2, lora=None, **training):
    family, kind, settings, phases, _ = CASES[name]
    phases = [Phase(phase, steps, learning_rate) for phase, steps in phases]
    lora = LoRA(rank=2, alpha=4.0) if lora is None else lora
    return kind(base=str(bases / family), phases=phases, seed=3, lora=lora, **settings, **training)


def untouched(name, bases):
    return kvtrain.load(bases / CASES[name][0], dtype=torch.float32)


def test_every_method_trains_adapters_and_its_own(bases, rows, tmp_path, subtests):
    """Weights of the base keep their bits, the teacher says what the untouched host says, checkpoints hold the rest."""
    for name, (_, _, _, phases, teaches_itself) in CASES.items():
        with subtests.test(name):
            host, module = untouched(name, bases), module_of(name, bases)
            trainer = train(module, rows, tmp_path / name, sum(steps for _, steps in phases))
            found = dict(module.model.named_parameters())
            trained = {key for key, parameter in found.items() if parameter.requires_grad}
            assert any(".lora_B." in key and found[key].abs().max() > 0 for key in trained)
            known = host.state_dict()
            for key in found.keys() - trained:
                before = known[plain_name(key)]
                assert torch.equal(found[key], before) or CASES[name][2].get("num_key_value_heads"), key
            assert all(is_adapter(key) or plain_name(key) not in known for key in trained)
            if module.distillation:
                batch = next(iter(trainer.train_dataloader))
                teacher = module.teacher_inputs(batch)[1]["teacher"]
                expected = host.model(batch["input_ids"][:1], position_ids=batch["position_ids"][:1]).last_hidden_state
                one = batch["document_ids"][0] == batch["document_ids"][0, 0]
                torch.testing.assert_close(teacher.hidden[0, one], expected[0, one], atol=1e-5, rtol=0)
            assert (module.teacher_model() is module.model) == teaches_itself
            trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
            assert read_checkpoint(tmp_path / f"{name}.ckpt")["state_dict"].keys() == {
                f"model.{key}" for key in trained
            }
            logged = table(tmp_path / name / "metrics.csv")
            assert all(row["loss"] == row["loss"] for row in logged)


def test_the_teacher_shares_what_does_not_train(bases, rows, tmp_path):
    """Two layers' keys and values are its own, and a module that trains whole; nothing else is held twice."""
    module = module_of("lckv", bases, lora=LoRA(rank=2, train_also=["o_proj"], targets=["q_proj", "up_proj"]))
    train(module, rows, tmp_path, 4)
    ours = {id(parameter) for parameter in module.model.parameters()}
    own = {name for name, parameter in module.teacher_model().named_parameters() if id(parameter) not in ours}
    layers = [f"model.layers.{layer}.self_attn" for layer in range(4)]
    assert own == {f"{layers[i]}.{part}.weight" for i in (1, 3) for part in ("k_proj", "v_proj")} | {
        f"{layer}.o_proj.weight" for layer in layers
    }
    known = untouched("lckv", bases).state_dict()
    for name, tensor in module.teacher_model().state_dict().items():
        assert torch.equal(tensor, known[name]), name
    assert not torch.equal(module.model.model.layers[0].self_attn.o_proj.weight, known[f"{layers[0]}.o_proj.weight"])


@pytest.mark.parametrize("name", ["dmc", "dms", "lckv", "duo"])
def test_a_resumed_run_is_the_run(name, bases, rows, tmp_path):
    """Dropout and all."""
    lora, steps = LoRA(rank=2, dropout=0.3), sum(steps for _, steps in CASES[name][3])
    whole, half, resumed = (module_of(name, bases, lora=lora) for _ in range(3))
    train(whole, rows, tmp_path / "whole", steps)
    trainer = train(half, rows, tmp_path / "half", 4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(17)
    train(resumed, rows, tmp_path / "resumed", steps, ckpt_path=tmp_path / "half.ckpt")
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], tensor), key


@pytest.mark.parametrize("lora", [LoRA(rank=2, alpha=4.0), LoRA(rank=3, use_dora=True, use_rslora=True)])
@pytest.mark.parametrize("name", ["full", "gqa", "dmc", "dms", "dms, channel", "lckv"])
def test_an_export_computes_what_the_adapters_do(name, lora, bases, rows, tmp_path):
    """Merged into the base, in the form that serves; decisions are the same."""
    module = module_of(name, bases, lora=lora)
    trainer = train(module, rows, tmp_path / "run", sum(steps for _, steps in CASES[name][3]))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    served = kvtrain.load(export_run(tmp_path / "last.ckpt", tmp_path / "out", dtype="float32"))
    assert not any(is_adapter(key) for key in served.state_dict())
    ids = random_ids(2, 24)
    with torch.no_grad():
        expected = module.model.eval()(ids, use_cache=False).logits
        found = served(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (expected - untouched(name, bases)(ids).logits).abs().max() > 1e-3
    if hasattr(served, "make_cache"):
        cache = served.make_cache()
        logits = [served(part, past_key_values=cache).logits for part in ids.split([15, 9], 1)]
        if name != "lckv":
            torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["dmc", "dms", "lckv"])
def test_an_adapter_that_is_kept_stands_beside_its_base(name, bases, rows, tmp_path):
    """PEFT opens it on the exported folder, and both together compute what was trained."""
    import peft

    module = module_of(name, bases)
    trainer = train(module, rows, tmp_path / "run", sum(steps for _, steps in CASES[name][3]))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    out = export_run(tmp_path / "last.ckpt", tmp_path / "out", "float32", keep_adapter=True)
    base, ids = kvtrain.load(out), random_ids(2, 24)
    with torch.no_grad():
        expected = module.model.eval()(ids, use_cache=False).logits
        alone = base(ids, use_cache=False).logits
        both = peft.PeftModel.from_pretrained(base, out / "adapter")(ids, use_cache=False).logits
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=0)
    assert (alone - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["dmc", "lckv", "duo"])
def test_frozen_weights_may_be_quantised(name, kind, wide_bases, rows, tmp_path):
    """Losses fall beside them, the teacher has the very same ones, and an export merges into those of the base."""
    pytest.importorskip("torchao" if kind == "int8" else "bitsandbytes")
    module = module_of(name, wide_bases, lora=LoRA(rank=2, alpha=4.0, quantize=kind))
    trainer = train(module, rows, tmp_path / "run", sum(steps for _, steps in CASES[name][3]))
    layers = base_layers(module.model, module._unchanged)
    assert len(layers) == {"dmc": 28, "duo": 28, "lckv": 24}[name]
    known = untouched(name, wide_bases).state_dict()
    for key, layer in layers.items():
        wide = known[f"{key}.weight"]
        eye = torch.eye(wide.shape[1])
        found = layer(eye).T - (0 if layer.bias is None else layer.bias[:, None])
        assert 0 < (found - wide).abs().max() < {"int8": 0.01, "nf4": 0.16}[kind] * wide.abs().max(), key
    if name != "duo":
        teacher = module.teacher_model()
        for key, layer in layers.items():
            assert teacher.get_submodule(key) is layer
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert all(is_adapter(key) or plain_name(key.removeprefix("model.")) not in known for key in stored(tmp_path))
    if name == "duo":
        return
    served = kvtrain.load(export_run(tmp_path / "last.ckpt", tmp_path / "out", "float32")).state_dict()
    for key in layers:
        adapted = module.model.get_submodule(key)
        expected = known[f"{key}.weight"] + getattr(adapted, "inner", adapted).get_delta_weight("default")
        if isinstance(adapted, OwnRows):
            expected[adapted.rows] = adapted.own_rows.weight
        torch.testing.assert_close(served[f"{key}.weight"], expected, atol=1e-6, rtol=0)


def stored(folder):
    return read_checkpoint(folder / "last.ckpt")["state_dict"]


@pytest.mark.parametrize("settings", [{"num_key_value_heads": 1}, {"lora": LoRA(rank=2, train_also=["o_proj"])}])
def test_who_changes_more_than_adapters_has_another_teacher(settings, bases, rows, tmp_path):
    """The untouched base, whatever the student has become."""
    module = module_of("dms", bases, **settings)
    trainer = train(module, rows, tmp_path, 6)
    host, batch = untouched("dms", bases), next(iter(trainer.train_dataloader))
    assert module.teacher_model() is not module.model
    one = batch["document_ids"][0] == batch["document_ids"][0, 0]
    expected = host.model(batch["input_ids"][:1], position_ids=batch["position_ids"][:1]).last_hidden_state
    found = module.teacher_inputs(batch)[1]["teacher"].hidden
    torch.testing.assert_close(found[0, one], expected[0, one], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"leave lora\.train_also out"):
        module_of("duo", bases, lora=LoRA(rank=2, train_also=["o_proj"]))


def test_what_trains_is_float32_and_what_shares_the_embeddings_stays_alone(tmp_path, bases):
    module = module_of("dmc", bases, weights="bfloat16", lora=LoRA(rank=2, train_also=["o_proj"]))
    for model in (module.build_model(), module.build_meta_model()):
        kinds = {(parameter.dtype, module.is_trainable(name)) for name, parameter in model.named_parameters()}
        assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    make_host("llama", dtype=torch.float32, tie_word_embeddings=True).save_pretrained(tmp_path)
    for settings in ({"targets": ["lm_head"]}, {"train_also": ["lm_head"]}):
        module = RetrofitModule(base=str(tmp_path), phases=[Phase("all", 1, 1e-3)], lora=LoRA(rank=2, **settings))
        with pytest.raises(UsageError, match="lora: lm_head has the weight of the embeddings"):
            module.build_model()


@pytest.mark.parametrize("name", ["dmc", "dms", "duo"])
def test_every_parameter_has_a_gradient_where_ranks_sum_them(name, bases, rows, tmp_path):
    """DDP ends a run over one that has none; borrowed rows have one while the channel is freed. Narrow weights, too."""
    steps = sum(steps for _, steps in CASES[name][3])
    train(module_of(name, bases), rows, tmp_path, steps, strategy="ddp")
    torch.distributed.destroy_process_group()
    train(module_of(name, bases, weights="bfloat16"), rows, tmp_path / "narrow", steps)


def test_adapters_may_learn_at_a_rate_of_their_own(bases):
    module = module_of("duo", bases, lora=LoRA(rank=2, learning_rate_scale=0.01))
    module.model = module.build_model()
    groups = module.configure_optimizers()["optimizer"].param_groups
    names = {parameter: name for name, parameter in module.model.named_parameters()}
    rates = {(".lora_" in names[p], group["initial_lr"]) for group in groups for p in group["params"]}
    assert rates == {(True, 0.01), (False, 1.0)}


def test_rows_of_their_own():
    """Inactive they are not there; active they are all that is left of those outputs, and merging says the same."""
    torch.manual_seed(0)
    inner = torch.nn.Linear(6, 8)
    module = OwnRows(inner, slice(3, None, 4))
    hidden = torch.randn(2, 5, 6)
    assert torch.equal(module(hidden), inner(hidden))
    module.active = True
    assert (module(hidden)[..., 3::4] == 0).all()
    for parameter in module.own_rows.parameters():
        torch.nn.init.normal_(parameter)
    expected = inner(hidden).clone()
    expected[..., 3::4] = hidden @ module.own_rows.weight.T + module.own_rows.bias
    torch.testing.assert_close(module(hidden), expected)


def test_the_borrowed_channel_keeps_its_old_rows(bases, rows, tmp_path):
    """The base's rows are there while the channel is freed, and rows of their own take their place afterwards."""
    module, seen = module_of("dmc", bases), []
    module.configure_model = lambda: None
    module.model = module.build_model().train()
    module.model.register_forward_pre_hook(lambda *_: seen.append({m.active for m in own_rows(module.model)}))
    train(module, rows, tmp_path, 9)
    assert seen == [{False}] * 3 + [{True}] * 6
    assert len(list(own_rows(module.model))) == 8
    for separate in own_rows(module.model):
        assert separate.own_rows.weight.abs().max() > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "lora.rank must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha must be above 0"),
        ({"learning_rate_scale": 0.0}, "lora.learning_rate_scale must be above 0"),
        ({"dropout": 1.0}, "lora.dropout must be from 0 to below 1"),
        ({"targets": []}, "lora.targets names no module; the usual ones are q_proj"),
        ({"quantize": "int3"}, "lora.quantize must be int8 or nf4, not 'int3'"),
    ],
)
def test_numbers_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        LoRA(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": ["query"]}, "no linear module 'query'; there are q_proj, k_proj"),
        ({"train_also": ["embed"]}, "no linear module 'embed'"),
        ({"quantize": "nf4"}, "nf4 takes rows of a multiple of 64 numbers, and model.layers.0.self_attn.q_proj has 32"),
        ({"rank": 99}, r"lora.rank is 99, more than model\.layers\.0\.self_attn\.q_proj \(.*\) can have; lower it"),
    ],
)
def test_what_a_model_cannot_have(settings, words, bases):
    if settings.get("quantize"):
        pytest.importorskip("bitsandbytes")
    with pytest.raises(UsageError, match=words):
        module_of("full", bases, lora=LoRA(**settings)).build_model()


@pytest.mark.parametrize("beside", ["the base", "nothing"])
def test_a_base_that_is_adapted_already(beside, bases, tmp_path):
    import peft

    model = untouched("full", bases)
    if beside == "the base":
        model.save_pretrained(tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    module = RetrofitModule(base=str(tmp_path), phases=[Phase("all", 1, 1e-3)], lora=LoRA(rank=2))
    with pytest.raises(UsageError, match=r"holds adapters of PEFT, for .*: merge them first"):
        module.check_model()
    if beside == "nothing":
        with pytest.raises(UsageError, match="merge them first"):
            kvtrain.load(tmp_path)


def test_narrow_weights_are_for_those_that_stay(bases):
    module = module_of("dmc", bases, weights="bfloat16")
    dtypes = {is_adapter(name): parameter.dtype for name, parameter in module.build_model().named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    with pytest.raises(ValueError, match="weights that train are float32"):
        DMCModule(base="b", phases=[Phase("finetune", 1, 1e-3)], weights="bfloat16")
