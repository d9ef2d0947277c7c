"""The data module of chats: prepared once, the same on several ranks, resumed exactly, refused where it must be."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import kvtrain
from kvtrain.data.chat.module import ChatDataModule
from kvtrain.data.chat.packing import Selection
from kvtrain.data.chat.picture import SAMPLES_PAGE
from kvtrain.data.chat.prepare import RECORD, prepare_chats
from kvtrain.data.chat.rendering import ChatRenderer
from kvtrain.data.module import PackedDataModule
from kvtrain.data.packing import IGNORE_INDEX
from tests.data.chat.templates import CHATML, QWEN

PLAIN = "configs/chat_templates/plain.jinja"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    turns = [("What is {} + 1?", "{} and one more." + " word" * 9), ("Sure?", "Yes, {}.")]
    rows = []
    for number in range(60):
        messages = [
            {"role": role, "content": words.format(number)}
            for question, answer in turns[: 1 + number % 2]
            for role, words in (("user", question), ("assistant", answer))
        ]
        rows.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(rows))
    return path


def module(path: Path, ranks: int = 1, rank: int = 0, **options: Any) -> ChatDataModule:
    options = {
        "tokenizer": "kvtrain:tiny",
        "chat_template": PLAIN,
        "sequence_length": 128,
        "batch_size": 2,
        "validation_share": 0.1,
        "cache_dir": str(path.parent / "cache"),
        **options,
    }
    data = ChatDataModule(chats=options.pop("chats", str(path)), **options)
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=2, global_rank=rank, world_size=ranks, distributed_sampler_kwargs=None
    )
    return data


def batches(loader: Any, count: int) -> list[dict[str, Any]]:
    return [
        {name: tensor.tolist() for name, tensor in batch.items()}
        for batch, _ in zip(loader, range(count), strict=False)
    ]


def test_every_answer_is_learned_once(chats: Path):
    """What training and held-out rows teach, decoded, is what the assistant says in the file."""
    data = module(chats)
    data.prepare_data()
    tokenizer, found = data.renderer.tokenizer, []
    for part in ("training", "held out"):
        rows = data.rows(data.chats, Selection(part, 0.1))  # type: ignore[arg-type]
        for row in range(len(rows)):
            labels = rows.batch([row])["labels"][0]  # type: ignore[arg-type]
            found += tokenizer.decode(labels[labels != IGNORE_INDEX]).split("<|endoftext|>")
    said = [m["content"] for line in chats.open() for m in json.loads(line)["messages"] if m["role"] == "assistant"]
    assert sorted(filter(None, found)) == sorted(said)
    assert len(data.rows(data.chats, Selection("held out", 0.1)).shards.keys[0]) == 60


def test_it_prepares_once_and_says_what_it_made(chats: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "kvtrain"):
        logging.getLogger("kvtrain").addHandler(caplog.handler)
        module(chats).prepare_data()
        module(chats).prepare_data()
        module(chats).val_dataloader()
        logging.getLogger("kvtrain").removeHandler(caplog.handler)
    (folder,) = [path for path in (chats.parent / "cache").iterdir() if path.is_dir()]
    lines = {record.getMessage() for record in caplog.records}
    assert len(lines) == 1
    line = lines.pop()
    assert line.startswith(f"{chats}: 60 chats, 90 answers, ")
    assert line.endswith(f"three of them are shown in {folder / SAMPLES_PAGE}")
    assert (folder / SAMPLES_PAGE).is_file()


def test_ranks_share_the_rows_of_one(chats: Path):
    alone = batches(module(chats, batch_size=4).train_dataloader(), 4)
    ranks = [batches(module(chats, ranks=2, rank=rank).train_dataloader(), 4) for rank in range(2)]
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert whole.pop("num_items") == first.pop("num_items") == second.pop("num_items")
        assert whole == {name: first[name] + second[name] for name in whole}
    held_out = [module(chats, ranks=2, rank=rank).val_dataloader() for rank in range(2)]
    seen = [row for loader in held_out for batch in loader for row in batch["row_ids"].tolist()]
    rows = module(chats).val_dataloader().rows
    assert sorted(set(seen)) == list(range(len(rows)))


def test_resuming_is_exact(chats: Path):
    whole = module(chats).train_dataloader()
    expected = batches(whole, len(whole)) + batches(whole, 3)
    first = module(chats).train_dataloader()
    before = batches(first, 2)
    second = module(chats).train_dataloader()
    second.load_state_dict(json.loads(json.dumps({**first.state_dict(), "cursor": 2})))
    after = batches(second, len(second)) + batches(second, 3)
    assert before + after == expected
    for changed in ({"seed": 1}, {"too_long": "drop"}, {"validation_share": 0.2}, {"sequence_length": 120}):
        with pytest.raises(ValueError, match="the data has changed since the checkpoint"):
            module(chats, **changed).train_dataloader().load_state_dict(first.state_dict())


def test_num_items_are_the_targets_of_a_window(chats: Path):
    loader = module(chats).train_dataloader()
    window = [next(iter_) for iter_ in [iter(loader)] for _ in range(2)]
    targets = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in window)
    assert [int(batch["num_items"]) for batch in window] == [targets, targets]


def test_chats_of_a_row_do_not_see_each_other(chats: Path):
    """The summed loss of packed rows is that of every chat alone."""
    model = kvtrain.retrofit(kvtrain.load("kvtrain:copy", dtype=torch.float64), kvtrain.Full()).eval()
    data = module(chats, tokenizer="kvtrain:copy", sequence_length=256, validation_share=0.5)
    batch = data.rows(data.chats, Selection("held out", 0.5)).batch(np.arange(2))
    given = {name: batch[name] for name in ("input_ids", "labels", "document_ids", "position_ids")}
    with torch.no_grad():
        packed = model(**given, num_items_in_batch=1, use_cache=False).loss
        alone = torch.zeros((), dtype=torch.float64)
        for row in range(2):
            for document in range(1, int(batch["document_ids"][row].max()) + 1):
                own = batch["document_ids"][row] == document
                ids, labels = batch["input_ids"][row, own][None], batch["labels"][row, own][None]
                alone += model(input_ids=ids, labels=labels, num_items_in_batch=1, use_cache=False).loss
    assert batch["document_ids"].max() > 2
    assert packed.item() == pytest.approx(alone.item(), rel=1e-10)


def test_held_out_chats_of_their_own(chats: Path):
    own = chats.with_name("own.jsonl")
    own.write_text('{"prompt": "a", "completion": "b"}\n')
    data = module(chats, validation_chats=str(own))
    (batch,) = data.val_dataloader()
    assert batch["input_ids"].shape == (1, 128)
    assert data.renderer.tokenizer.decode(batch["input_ids"][0]).startswith(
        "### user\na<|endoftext|>\n### assistant\nb"
    )
    assert data.train_dataloader().rows.fit.texts == 60


def test_what_does_not_fit_is_said_once(chats: Path, caplog: pytest.LogCaptureFixture):
    logging.getLogger("kvtrain").addHandler(caplog.handler)
    data = module(chats, sequence_length=48)
    data.train_dataloader(), data.train_dataloader()
    logging.getLogger("kvtrain").removeHandler(caplog.handler)
    lines = {record.getMessage() for record in caplog.records if "longer" in record.getMessage()}
    fit = data.train_dataloader().rows.fit
    assert 0 < fit.cut < fit.texts
    words = (
        f"of {fit.texts} texts {fit.cut} are longer than 48 tokens and cut, {fit.dropped} are left out (too_long: cut)"
    )
    assert lines == {f"{chats} (training): {words}"}


def test_a_prepared_folder_is_a_corpus(chats: Path, chat_tokenizer: Any):
    written = module(chats)
    written.prepare_data()
    (folder,) = [path for path in (chats.parent / "cache").iterdir() if path.is_dir()]
    data = module(chats, chats=str(folder))
    assert batches(data.train_dataloader(), 3) == batches(written.train_dataloader(), 3)
    with pytest.raises(ValueError, match="written with another chat template; give what it was prepared with as chat_"):
        module(chats, chats=str(folder), chat_template=CHATML).train_dataloader()
    with pytest.raises(ValueError, match="written with another chat template"):
        module(chats, chats=str(folder), template_arguments={"a": 1}).train_dataloader()
    with pytest.raises(ValueError, match="written with another tokenizer than 'kvtrain:copy'"):
        module(chats, chats=str(folder), tokenizer="kvtrain:copy").train_dataloader()
    with pytest.raises(ValueError, match="a folder of chats; train on it with data"):
        PackedDataModule("kvtrain:tiny", str(folder)).rows([str(folder)])
    (folder / RECORD).write_text("{}")
    with pytest.raises(ValueError, match=r"chats\.json: damaged; prepare the chats again"):
        module(chats, chats=str(folder)).train_dataloader()
    (folder / RECORD).unlink()
    with pytest.raises(ValueError, match=r"no chats\.json; write the folder with `kvtrain prepare --chats`"):
        module(chats, chats=str(folder)).train_dataloader()


def test_texts_of_one_chat_are_all_packed(chats: Path, chat_tokenizer: Any, tmp_path: Path):
    """Qwen's shape makes two texts of a chat with two questions; both are on the same side."""
    renderer = ChatRenderer(chat_tokenizer, QWEN)
    prepare_chats([str(chats)], renderer, tmp_path / "out", shard_tokens=300)
    assert (renderer.counts.texts, renderer.counts.split) == (90, 30)


def test_the_tokens_of_the_template_count(chats: Path, chat_tokenizer: Any, tmp_path: Path):
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = module(chats, tokenizer=str(tmp_path / "tokenizer"), chat_template=CHATML)
    assert data.highest_id() == chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert module(chats).highest_id() == 4095
    assert data.chat_template == CHATML
    assert torch.stack([batch["input_ids"].max() for batch in data.train_dataloader()]).max() == data.highest_id()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation_share": 0.0}, "validation_share is a share, above 0 and below 1, not 0.0"),
        ({"validation_share": 1.5}, "validation_share is a share"),
        ({"too_long": "split"}, "too_long must be cut or drop, not 'split'"),
        ({"chats": ""}, "chats is empty; name a file, a folder, hf:org/name, or examples"),
        ({"validation_chats": []}, "validation_chats is empty"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"sequence_length": 1}, "sequence_length must be at least 2, not 1"),
        ({"seed": -1}, "data.seed must be from 0"),
        (
            {"chat_template": "nowhere.jinja"},
            "nowhere.jinja: No such file or directory; a chat template is given as text, or",
        ),
    ],
)
def test_values_that_are_refused(chats: Path, options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        module(chats, **options)
