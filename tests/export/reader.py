"""Opens folders as somebody does who has torch and transformers alone: a script, which never imports kvtrain.

``python reader.py blocked|bare FOLDER...``: of each folder ``asked.json`` says how to open it, from where it lies or as
a repository of the Hub at one of its commits, and where to save it again, ``asked.safetensors`` what to run;
``found.safetensors`` is left there. With ``blocked`` packages are absent that are installed.
"""

import contextlib
import importlib
import json
import sys
from pathlib import Path

ABSENT = ("kvtrain", "lightning", "datasets", "liger_kernel")
BLOCKED = {*ABSENT, "accelerate", "deepspeed", "peft", "torchao", "triton"}


class Without:
    """A finder that does not find these packages."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, *rest)


if sys.argv[1] == "blocked":
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def refusal(auto, place):
    """What opening it without trust comes to."""
    try:
        auto.from_pretrained(**place, trust_remote_code=False)
    except ValueError as error:
        return str(error)
    return None


def read(folder):
    """Run one model, and say what it is."""
    asked, ids = json.loads((folder / "asked.json").read_text()), load_file(folder / "asked.safetensors")["ids"]
    auto, cache = getattr(transformers, asked["auto"]), None
    place = {"pretrained_model_name_or_path": asked["repository"] or str(folder), "revision": asked["revision"]}
    refused = refusal(auto, place)
    model = auto.from_pretrained(**place, trust_remote_code=True)
    found = {"logits": model(ids).logits}
    if model.can_generate():
        answer = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        cache, found["tokens"] = getattr(answer, "cache", None) or answer.past_key_values, answer.sequences
    if asked["again"]:
        model.save_pretrained(asked["again"])
        found["again"] = auto.from_pretrained(asked["again"], trust_remote_code=True)(ids).logits
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "found.safetensors")
    return {"refused": refused, "model": type(model).__name__, "cache": type(cache).__name__}


def present():
    """Which packages can be imported all the same."""
    found = []
    for name in ABSENT:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
            found.append(name)
    return found


with torch.no_grad():
    answers = {path.name: read(path) for path in map(Path, sys.argv[2:])}
print(json.dumps({"answers": answers, "modules": [*sys.modules], "present": present()}))
