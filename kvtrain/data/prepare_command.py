"""``kvtrain prepare``: text or chats become shards of tokens."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtrain.errors import UsageError
from kvtrain.parser import Parser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHAT_OPTIONS = ("chat_template", "template_arguments", "messages_column")


def add_arguments(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--corpus",
        action="append",
        help="jsonl, parquet or txt file, a folder of them, hf:org/name, stdlib, heldout or passkey; may be repeated",
    )
    parser.add_argument(
        "--chats",
        action="append",
        help="in place of --corpus: jsonl, json or parquet file of chats, a folder of them, hf:org/name, or examples; "
        "may be repeated. Shows three of them, and what is learned of each",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="T",
        help="folder, Hub id or kvtrain:tiny; with --train-tokenizer the folder where the new one goes",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the shards")
    parser.add_argument("--text-column", metavar="NAME", help="field that holds the text (text)")
    parser.add_argument("--split", default="train", help="split of Hub datasets (train)")
    parser.add_argument(
        "--train-tokenizer", type=int, metavar="VOCAB", help="first train a byte-level BPE of this vocabulary"
    )
    parser.add_argument("--chat-template", metavar="FILE", help="of the chats; the tokenizer's own if left out")
    parser.add_argument(
        "--template-arguments", type=_json_object, metavar="JSON", help="such as '{\"enable_thinking\": false}'"
    )
    parser.add_argument(
        "--messages-column",
        metavar="NAME",
        help="field that holds a chat (messages, conversations, prompt + completion)",
    )


def run(asked: argparse.Namespace) -> None:
    """Write the shards.

    Raises:
        ValueError: Bad input, or options that do not go together.
    """
    if bool(asked.corpus) == bool(asked.chats):
        raise UsageError("give text as --corpus, or chats as --chats" + (", not both" if asked.chats else ""))
    if asked.chats:
        if asked.train_tokenizer is not None:
            raise UsageError("--train-tokenizer learns from text; train it on a --corpus first")
        if asked.text_column is not None:
            raise UsageError("--text-column is for --corpus; a chat's field is --messages-column")
        _prepare_chats(asked)
        return
    given = next((name for name in _CHAT_OPTIONS if getattr(asked, name) is not None), None)
    if given:
        raise UsageError(f"--{given.replace('_', '-')} is for --chats")
    _prepare_text(asked)


def _prepare_text(asked: argparse.Namespace) -> None:
    from kvtrain.data.corpus import read_corpus, require_corpus
    from kvtrain.data.prepare import prepare_corpus
    from kvtrain.data.shards import new_folder, require_new
    from kvtrain.data.tokenizer import load_tokenizer, train_tokenizer

    for corpus in asked.corpus:
        require_corpus(corpus)
    read = {"text_column": asked.text_column or "text", "split": asked.split}
    output = Path(asked.output)
    if asked.train_tokenizer is None:
        manifest = prepare_corpus(asked.corpus, load_tokenizer(asked.tokenizer), output, **read)
    else:
        folder = Path(asked.tokenizer)
        if folder.exists():
            raise UsageError(f"{folder} exists already; --train-tokenizer writes a new folder")
        require_new(output)
        texts = (document.text for corpus in asked.corpus for document in read_corpus(corpus, **read))
        with new_folder(folder) as unfinished:  # tokenizer and shards are kept together or not at all
            tokenizer = train_tokenizer(texts, asked.train_tokenizer, unfinished)
            manifest = prepare_corpus(asked.corpus, tokenizer, output, **read)
    print(f"{asked.output}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")


def _prepare_chats(asked: argparse.Namespace) -> None:
    from kvtrain.data.chat.corpus import require_chats
    from kvtrain.data.chat.picture import SAMPLES_PAGE, print_samples
    from kvtrain.data.chat.prepare import ChatRecord, prepare_chats
    from kvtrain.data.chat.rendering import ChatRenderer
    from kvtrain.data.chat.template import read_template
    from kvtrain.data.shards import require_new
    from kvtrain.data.tokenizer import load_tokenizer

    for corpus in asked.chats:
        require_chats(corpus)
    output = Path(asked.output)
    require_new(output)
    template = read_template(asked.chat_template) if asked.chat_template else None
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(asked.tokenizer)
    renderer = ChatRenderer(tokenizer, template, asked.template_arguments or {})
    manifest = prepare_chats(asked.chats, renderer, output, messages_column=asked.messages_column, split=asked.split)
    print_samples(output, tokenizer)
    print(f"{asked.output}: {ChatRecord.read(output).summary(manifest)}")
    print(f"the same samples, token by token: {output / SAMPLES_PAGE}")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
