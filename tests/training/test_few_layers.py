"""A few layers tell of all: the quick rehearsal comes to what the full one does, byte for byte."""

import pytest
from transformers import LlamaConfig, Qwen3Config

from kvtrain.models.dmc import DMC
from kvtrain.models.dms import DMS
from kvtrain.models.duo import Duo
from kvtrain.models.hybrid import Hybrid
from kvtrain.models.lckv import LCKV
from kvtrain.training import (
    DMCModule,
    DMSModule,
    DuoModule,
    HybridModule,
    HybridPretrainModule,
    LCKVModule,
    LCKVPretrainModule,
    Phase,
    PretrainModule,
    RetrofitModule,
    TransNormerClassificationModule,
    TransNormerMaskedModule,
    TransNormerModule,
    memory_estimate,
    training_modules,
)
from kvtrain.training.memory_estimate import measure_step_memory
from kvtrain.training.meter import LayerMarks
from tests.thinning import thinned
from tests.training.test_memory_estimate import VOCAB

SIZES = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FEW = 3  # layers alike, and no more, are rehearsed whole here
DEPTH = FEW + 1
PHASES = [Phase("zero_out", 2, 1e-3), Phase("retrofit", 3, 1e-3), Phase("finetune", 1, 1e-3)]
TRAIN = [Phase("train", 2, 1e-3)]


@pytest.fixture(autouse=True)
def _shallow(monkeypatch):
    monkeypatch.setattr(memory_estimate, "_FEW", FEW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes hosts' configurations, by family and depth."""
    root = tmp_path_factory.mktemp("hosts")

    def write(family=LlamaConfig, depth=DEPTH):
        path = root / f"{family.model_type}-{depth}"
        family(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=depth, **SIZES).save_pretrained(path)
        return str(path)

    return write


def sharing(kv_map, checkpointing=False, **settings):
    settings = {"forward_passes": 3, **settings}
    return lambda folder, depth=DEPTH + 3: LCKVModule(
        folder(depth=depth), LCKV(kv_map, **settings), phases=TRAIN, activation_checkpointing=checkpointing
    )


def transnormer(kind=TransNormerModule, preset=None, checkpointing=False, **config):
    config = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "block_size": 8, **config}
    return lambda _, depth=2 * DEPTH: kind(
        {"num_hidden_layers": depth, **config}, preset, phases=TRAIN, activation_checkpointing=checkpointing
    )


def duo(**settings):
    method = Duo(sink=4, recent=8, mixing=settings.pop("mixing", "self"), gates=settings.pop("gates", "plain"))
    return lambda folder, depth=DEPTH: DuoModule(folder(depth=depth), method, phases=TRAIN, **settings)


FAST = {
    "pretrain": lambda folder, depth=DEPTH: PretrainModule(folder(depth=depth), phases=TRAIN),
    "retrofit": lambda folder, depth=DEPTH: RetrofitModule(
        folder(Qwen3Config, depth), num_key_value_heads=1, distill=True, phases=TRAIN
    ),
    "dmc": lambda folder, depth=DEPTH: DMCModule(
        folder(depth=depth), DMC(), phases=PHASES[:2], distill=True, activation_checkpointing=True
    ),
    "dms": lambda folder, depth=DEPTH: DMSModule(
        folder(depth=depth), DMS(window=8), phases=PHASES[1:], activation_checkpointing=True
    ),
    "duo": duo(activation_checkpointing=True),
    "hybrid": lambda folder: HybridModule(
        folder(depth=2 * DEPTH),
        phases=[Phase("match", 2, 1e-3), Phase("distill", 2, 1e-3)],
        activation_checkpointing=True,
    ),
    "hybrid-pretrain": lambda folder: HybridPretrainModule(folder(depth=2 * DEPTH), Hybrid(), phases=TRAIN),
    "lckv": sharing("lckv-w2", checkpointing=True),
    "lckv-pretrain": lambda folder, depth=2 * DEPTH: LCKVPretrainModule(
        folder(depth=depth), LCKV("cla2"), phases=TRAIN
    ),
    "transnormer": transnormer(),
    "masked": transnormer(TransNormerMaskedModule, "roberta"),
    "classes": transnormer(TransNormerClassificationModule, "lra", num_labels=3),
}
MORE = {
    "pretrain-checkpointed": lambda folder: PretrainModule(folder(), phases=TRAIN, activation_checkpointing=True),
    "dmc-kept": lambda folder: DMCModule(folder(), DMC(), phases=PHASES),
    "dmc-quiet": lambda folder: DMCModule(folder(), DMC(decisions="random"), phases=PHASES, noisy_finetune=False),
    "dmc-zero-out": lambda folder: DMCModule(folder(), DMC(shared_decisions=True), phases=PHASES[:1]),
    "dms-kept": lambda folder: DMSModule(folder(), DMS(window=8), phases=PHASES[1:]),
    "dms-all": lambda folder: DMSModule(folder(), DMS(window=8, trainable="all"), phases=PHASES[1:]),
    "dms-channel": lambda folder: DMSModule(
        folder(), DMS(window=8, decide_by="query_channel", trainable="all"), phases=PHASES
    ),
    "duo-kept": duo(),
    "duo-teacher": duo(mixing="teacher"),
    "duo-hard": duo(gates="hard_concrete", distill=False, weights="bfloat16"),
    "lckv-kept": sharing("lckv-w2"),
    "lckv-w12": lambda folder: sharing("lckv-w8")(folder, depth=12),
    "lckv-stale": sharing("lckv-w2", mask_all_diagonals=True, stale_target=True),
    "yoco": lambda folder: sharing("yoco")(folder, depth=9),
    "sandwich": lambda folder: sharing("sandwich-middle-3")(folder, depth=11),
    "pizza": lambda folder: sharing("pizza-bottom", residual=True)(folder, depth=9),
    "lasagna": lambda folder: sharing("lasagna-top-4")(folder, depth=8),
    "first-values": lambda folder: sharing("pizza-bottom-3", value_map="first")(folder, depth=9),
    "transnormer-t1": transnormer(variant="T1"),
    "transnormer-odd": lambda folder: transnormer()(folder, depth=2 * DEPTH + 1),
    "transnormer-checkpointed": transnormer(checkpointing=True, num_block_heads=2, decay="paper"),
}


def check(module, **settings):
    settings = {"batch_size": 2, "sequence_length": 32, **settings}
    quick, full = measure_step_memory(module, **settings), measure_step_memory(module, every_layer=True, **settings)
    names = ("parameters", "gradients", "optimizer", "teacher", "activations", "peak")
    assert {name: getattr(quick, name) for name in names} == {name: getattr(full, name) for name in names}
    assert quick.moments.keys() < full.moments.keys()


@pytest.mark.parametrize("name", thinned(FAST, FAST.keys() - {"hybrid", "classes", "lckv-pretrain", "retrofit"}))
def test_a_few_layers_tell_of_all(folder, name):
    check(FAST[name](folder), precision="bf16-mixed")


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [{}, {"accumulates": True, "on_cpu": False}], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", [*FAST, *MORE])
def test_a_few_layers_tell_of_all_in_every_form(folder, name, elsewhere):
    check({**FAST, **MORE}[name](folder), batch_size=3, sequence_length=64, **elsewhere)


def test_every_kind_of_module_is_looked_at(folder):
    assert {type(make(folder)) for make in FAST.values()} == set(training_modules())


@pytest.mark.parametrize("name", ["pretrain", "lckv", "transnormer"])
def test_no_more_layers_are_rehearsed_of_a_deeper_model(folder, monkeypatch, name):
    entered = []
    monkeypatch.setattr(LayerMarks, "_mark", lambda _, what, number: entered.append(what))
    counts = []
    for depth in (12, 30):
        measure_step_memory(FAST[name](folder, depth), batch_size=1, sequence_length=16)
        counts.append(entered.count("in"))
        entered.clear()
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", ["pretrain", pytest.param("duo", marks=pytest.mark.slow)])
def test_long_rows_follow_from_shorter_ones(folder, monkeypatch, name):
    """Nearly: hidden states as narrow as here are worked on in slices that are longer than the shorter rows."""
    module = FAST[name](folder)
    settings = {"batch_size": 1, "precision": "bf16-mixed"}
    read = measure_step_memory(module, sequence_length=8192, **settings)
    monkeypatch.setattr(memory_estimate, "_LONG", 4096)
    told = measure_step_memory(module, sequence_length=8192, **settings)
    assert told.activations == pytest.approx(read.activations, rel=1e-3)
    assert told.peak == pytest.approx(read.peak, rel=0.05)
    assert told.parameters == read.parameters
