"""What the package carries: a small pretrained Llama, a smaller one that copies, their tokenizers, held-out text.

``kvtrain:tiny`` and ``kvtrain:copy`` name the model folders wherever a model or tokenizer path is asked for.
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
    carried = sorted(path.parent.name for path in ASSETS.glob("*/tokenizer.json"))
    if name.removeprefix(PREFIX) not in carried:
        known = ", ".join(PREFIX + folder for folder in carried)
        raise ValueError(f"the package carries no model {name!r}; it has {known}")
    return str(ASSETS / name.removeprefix(PREFIX))
