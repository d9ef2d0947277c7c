"""What the package carries: a small pretrained Llama, a smaller one that copies, their tokenizers, held-out text.

``kvtrain:tiny``, the same trained on to find what names mean (``kvtrain:recall``), and ``kvtrain:copy`` name the model
folders wherever a model or tokenizer path is asked for.
"""

from pathlib import Path

ASSETS = Path(__file__).parent
HELDOUT = ASSETS / "heldout.jsonl"
PREFIX = "kvtrain:"


def resolve(name: str) -> str:
    """Turn ``kvtrain:<model>`` into the folder inside the package; leave paths and Hub ids alone.

    Raises:
        ValueError: The package carries no model of that name.
    """
    if not name.startswith(PREFIX):
        return name
    tokenizers = sorted(ASSETS.glob("*/tokenizer.json"))
    for path in tokenizers:
        if name == f"{PREFIX}{path.parent.name}":
            return str(path.parent)
    known = ", ".join(f"{PREFIX}{path.parent.name}" for path in tokenizers)
    raise ValueError(f"the package carries no model {name!r}; it has {known}")
