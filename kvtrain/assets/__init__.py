"""What the package carries: a small pretrained Llama, its tokenizer, held-out text.

``kvtrain:tiny`` names the model folder wherever a model or tokenizer path is asked for.
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
    folder = ASSETS / name.removeprefix(PREFIX)
    if not folder.is_dir() or folder.parent != ASSETS:
        carried = sorted(f"{PREFIX}{path.parent.name}" for path in ASSETS.glob("*/tokenizer.json"))
        raise ValueError(f"the package carries no model {name!r}; it has {', '.join(carried)}")
    return str(folder)
