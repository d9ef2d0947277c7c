"""Opens folders as somebody does who has torch and transformers alone; run as a script, and never imports kvtrain.

``python reader.py BLOCK FOLDER...``: each folder holds ``asked.json``, how to open it, and ``asked.safetensors``, tokens
to run; what comes out is left beside them. ``BLOCK`` names packages, with commas, that must not be found.
"""

import json
import sys
from pathlib import Path

blocked = [name for name in sys.argv[1].split(",") if name]


class Absent:
    """An import system in which these packages do not exist."""

    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent)

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def refusal(auto, folder):
    try:
        auto.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        return str(error)
    return None


def read(folder):
    """Answers of one model, and what it is."""
    asked, ids = json.loads((folder / "asked.json").read_text()), load_file(folder / "asked.safetensors")["ids"]
    auto = getattr(transformers, asked["auto"])
    refused = refusal(auto, folder)
    model = auto.from_pretrained(folder, trust_remote_code=True)
    found = {"logits": model(ids).logits}
    cache = None
    if model.can_generate():
        made = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        cache, found["tokens"] = getattr(made, "cache", None) or made.past_key_values, made.sequences
    if again := asked.get("again"):
        model.save_pretrained(again)
        found["again"] = auto.from_pretrained(again, trust_remote_code=True)(ids).logits
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "found.safetensors")
    return {"refused": refused, "model": type(model).__name__, "cache": type(cache).__name__, "code": type(model).__module__}


with torch.no_grad():
    answers = {path.name: read(path) for path in map(Path, sys.argv[2:])}
print(json.dumps({"answers": answers, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
