"""Small chats to try things out with, always the same: sums, the standard library's names, and short facts.

``python -m kvtrain.data.chat.examples FILE`` writes them as jsonl.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvtrain.data.chat.formats import Chat

EXAMPLES = "examples"
NUM_CHATS = 3000
_MOST_TURNS = 3
_LARGEST = 20  # of the numbers in sums
_BRIEF = "Answer with one word."
_BRIEF_SHARE = 0.25

_MODULES = (
    "json: dumps loads; os: getcwd listdir environ; sys: argv stdin exit; re: compile match findall; "
    "math: sqrt pi floor; time: sleep monotonic; random: shuffle choice; collections: deque Counter OrderedDict; "
    "itertools: chain islice count; functools: partial lru_cache reduce; pathlib: Path PurePath; "
    "datetime: timedelta date; threading: Thread Lock Event; subprocess: run Popen; shutil: rmtree copytree; "
    "logging: getLogger basicConfig; argparse: ArgumentParser; socket: gethostname; struct: pack unpack; "
    "hashlib: sha256 md5; csv: reader DictReader; tempfile: mkdtemp NamedTemporaryFile; textwrap: dedent; "
    "contextlib: suppress contextmanager; io: StringIO BytesIO; pickle: PickleError; unittest: TestCase mock; "
    "typing: Any Optional; copy: deepcopy; string: Template; glob: iglob; queue: Queue; abc: ABC; enum: Enum"
)
_HOMES = {
    name: module.strip()
    for entry in _MODULES.split(";")
    for module, _, names in [entry.partition(":")]
    for name in names.split()
}
_FACTS = (
    ("How many days has a week", "seven", "A week has seven days"),
    ("How many months has a year", "twelve", "A year has twelve months"),
    ("How many hours has a day", "24", "A day has 24 hours"),
    ("How many minutes has an hour", "60", "An hour has 60 minutes"),
    ("How many bits has a byte", "eight", "A byte has eight bits"),
    ("Which month comes after May", "June", "June comes after May"),
    ("Which day comes after Monday", "Tuesday", "Tuesday comes after Monday"),
    ("What is the first letter", "A", "The first letter is A"),
    ("What is the last letter", "Z", "The last letter is Z"),
    ("Which keyword defines a function", "def", "The keyword def defines a function"),
    ("Which keyword defines a class", "class", "The keyword class defines a class"),
    ("Which keyword ends a loop", "break", "The keyword break ends a loop"),
    ("Which value means nothing", "None", "The value None means nothing"),
    ("Which type holds text", "str", "The type str holds text"),
    ("Which type has keys and values", "dict", "The type dict has keys and values"),
    ("Which error does a missing key raise", "KeyError", "A missing key raises KeyError"),
    ("Which error does a wrong index raise", "IndexError", "A wrong index raises IndexError"),
)
_LEADS = ("", "Please tell me: ", "I want to know: ", "Do you know this? ")


def example_chats() -> Iterator[Chat]:
    """The chats, without repetitions; the generator's seed is fixed."""
    rng, seen = np.random.default_rng(0), set[int]()
    while len(seen) < NUM_CHATS:
        brief = bool(rng.random() < _BRIEF_SHARE)
        messages = [{"role": "system", "content": _BRIEF}] if brief else []
        for _ in range(int(rng.integers(1, _MOST_TURNS + 1))):
            question, word, sentence = _exchange(rng)
            lead = _LEADS[int(rng.integers(len(_LEADS)))]
            messages.append({"role": "user", "content": f"{lead}{question}?"})
            messages.append({"role": "assistant", "content": word if brief else f"{sentence}."})
        chat = Chat(messages, None, f"{EXAMPLES} {len(seen) + 1}")
        if chat.key not in seen:
            seen.add(chat.key)
            yield chat


def _exchange(rng: np.random.Generator) -> tuple[str, str, str]:
    """A question, its answer in a word, and in a sentence."""
    kind = int(rng.integers(3))
    if kind == 0:
        first, second = sorted(rng.integers(1, _LARGEST + 1, size=2).tolist(), reverse=True)
        sign, result = ("+", first + second) if rng.random() < 0.5 else ("-", first - second)
        return f"What is {first} {sign} {second}", str(result), f"{first} {sign} {second} is {result}"
    if kind == 1:
        name = list(_HOMES)[int(rng.integers(len(_HOMES)))]
        return f"Which module has {name}", _HOMES[name], f"The module {_HOMES[name]} has {name}"
    return _FACTS[int(rng.integers(len(_FACTS)))]


def write_examples(path: Path) -> None:
    """Write the chats as jsonl, a chat a line."""
    lines = (json.dumps({"messages": chat.messages}) + "\n" for chat in example_chats())
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m kvtrain.data.chat.examples FILE")
    write_examples(Path(sys.argv[1]))
