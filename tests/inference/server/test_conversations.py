"""Chats as tokens: what was said keeps its own, whatever a tokenizer would make of it."""

import pytest

from kvtrain.inference.server import conversations
from kvtrain.inference.server.conversations import Conversations
from kvtrain.inference.server.errors import ApiError
from tests.inference.server.servers import tokenizer_with


def plain(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_a_chat_that_goes_on_begins_with_the_tokens_of_the_longest_known_one():
    tokenizer = tokenizer_with()
    chats = Conversations(tokenizer)
    letters = [token for letter in "import" for token in plain(tokenizer, letter)]
    assert chats.ids("import os") == plain(tokenizer, "import os") != [*letters, *plain(tokenizer, " os")]
    chats.remember("im", letters[:2])
    chats.remember("import", letters)
    assert chats.ids("import os") == [*letters, *plain(tokenizer, " os")]
    assert chats.ids("image") == [*letters[:2], *plain(tokenizer, "age")]
    assert chats.ids("other") == plain(tokenizer, "other")
    chats.remember("import", plain(tokenizer, "import"))  # said anew in other tokens
    assert chats.ids("import") == plain(tokenizer, "import")


@pytest.mark.parametrize(("texts", "characters"), [(2, 1000), (1000, 11)])
def test_what_was_not_asked_for_lately_is_forgotten(monkeypatch, texts, characters):
    monkeypatch.setattr(conversations, "_MOST_TEXTS", texts)
    monkeypatch.setattr(conversations, "_MOST_CHARACTERS", characters)
    tokenizer = tokenizer_with()
    chats = Conversations(tokenizer)
    for text in ("aaaa", "bbbb"):
        chats.remember(text, [7])
    assert chats.ids("aaaa") == [7]
    chats.remember("cccc", [7])
    assert chats.ids("aaaa") == chats.ids("cccc") == [7] and chats.ids("bbbb") != [7]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "--chat-template FILE"),
        ("{{ raise_exception('be polite') }}", "be polite"),
        ("{{ messages[0].content.nothing.at_all }}", "the chat template refuses them"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template refuses them"),
        ("{# nothing #}", "makes no text of them"),
    ],
)
def test_a_template_that_makes_no_text_says_why(template, words):
    with pytest.raises(ApiError, match=words) as caught:
        Conversations(tokenizer_with(template)).text([{"role": "user", "content": "x"}])
    assert caught.value.status == 400 and caught.value.param == "messages"
