"""A tokenizer with the tokens that chat templates write."""

from typing import Any

import pytest
from tokenizers import AddedToken

from kvtrain.data.tokenizer import load_tokenizer
from tests.data.chat.templates import SPECIAL


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    tokenizer = load_tokenizer("kvtrain:tiny")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer
