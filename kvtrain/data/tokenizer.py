"""Tokenizers: load one, or train a small byte-level BPE where there is none."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtrain.assets import resolve
from kvtrain.data.hub import why_unreachable
from kvtrain.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


def load_tokenizer(name: str, **options: Any) -> "PreTrainedTokenizerFast":
    """Load a fast tokenizer from a folder, a Hub id or ``kvtrain:tiny``.

    Args:
        name: Of it.
        **options: Where on the Hub it is, and who asks: ``token``, ``revision``, ``subfolder`` ...

    Raises:
        ValueError: There is none, or it is not a fast one.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = resolve(name)
    local = Path(path).is_dir() or bool(options.pop("local_files_only", False))
    try:
        alone = local or why_unreachable() is not None
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=alone, **options)
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise ValueError(f"no tokenizer at {name!r} ({_reason(error, local)})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{name!r} has no fast tokenizer; convert it with transformers first")
    return tokenizer


def _reason(error: Exception, local: bool) -> str:
    unreachable = None if local else why_unreachable()
    if unreachable is None:
        return first_line(error)
    return f"no such folder, nothing in the Hub's cache, and the Hub cannot be reached: {unreachable}"


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: Path) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE with single digits and save it as an HF folder.

    Args:
        texts: Documents.
        vocab_size: Size with the two special tokens; at least 258 (the bytes).
        output: Folder for ``tokenizer.json`` and its configuration.

    Raises:
        ValueError: The vocabulary cannot hold the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"a vocabulary of {vocab_size} cannot hold all bytes; use at least {len(alphabet) + 2}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT, PADDING], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING
    )
    fast.save_pretrained(output)
    return fast
