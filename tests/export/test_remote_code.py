"""Folders with their model's code in them, opened by processes that have no kvtrain."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

import kvtrain
from kvtrain.export.flatten import PRESENT
from kvtrain.export.hf import export_run
from kvtrain.export.remote_code import remote_code, write_remote_code
from kvtrain.models.portable import SHIM
from tests.caches import CACHES, MAIN, SOME_MAIN
from tests.export.test_hf import card_of, write_run
from tests.export.test_portable import SIZES
from tests.hosts import FAMILIES, make_host, random_ids
from tests.processes import ROOT
from tests.thinning import thinned

READER = Path(__file__).with_name("reader.py")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HEADS = {"CausalLM": True, "MaskedLM": False, "SequenceClassification": False}


def cached(name, family="llama"):
    """One of the models that the caches' suite has."""
    entry = CACHES[name]
    model = entry.retrofit(make_host(family, layers=entry.layers, dtype=torch.float32))
    if name == "dmc":  # whose threshold was moved in its layers
        model.config.method_config = model.model.layers[0].self_attn.settings.to_dict()
    return model


def transnormer(head):
    """Any of TransNormer's models."""
    torch.manual_seed(0)
    config = kvtrain.TransNormerConfig(**SIZES, causal=HEADS[head], num_labels=3, pad_token_id=0)
    return getattr(kvtrain, f"TransNormerFor{head}")(config).eval()


def prepare(folder, model, head="CausalLM", again=None, repository=None):
    """A folder with code for ``reader.py``, and what kvtrain itself makes of it."""
    model.save_pretrained(folder)
    written = write_remote_code(folder, model.config)
    ids = random_ids(2, 24) % 40
    save_file({"ids": ids}, folder / "asked.safetensors")
    asked = {"auto": f"AutoModelFor{head}", "again": again and str(again)}
    asked |= {"repository": repository, "revision": repository and COMMIT}
    (folder / "asked.json").write_text(json.dumps(asked))
    opened = kvtrain.load(folder)
    with torch.no_grad():
        expected = {"logits": opened(ids).logits}
        if opened.can_generate():
            expected["tokens"] = opened.generate(ids, max_new_tokens=8, do_sample=False)
    return written, expected


def read(folders, place, python=sys.executable, mode="blocked", **more):
    """What ``reader.py`` says of folders, in a process of its own, whose environment may have more in it."""
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(place / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(place),
        **more,
    }
    environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [str(python), str(READER), mode, *map(str, folders)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=place)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def assert_opens(told, folder, model, expected, plain=False):
    """The same numbers as with kvtrain, by the matching cache, and not without trust; plain hosts need neither."""
    answer, found = told["answers"][folder.name], load_file(folder / "found.safetensors")
    assert answer["model"] == type(model).__name__
    assert answer["refused"] is None if plain else "trust_remote_code=True" in answer["refused"]
    own = "DynamicCache" if plain else "KVCache"
    assert answer["cache"] == (own if "tokens" in expected else "NoneType")
    again = {"again": expected["logits"]} if "again" in found else {}
    for name, tensor in {**expected, **again}.items():
        assert torch.equal(found.pop(name), tensor), (folder.name, name)
    assert not found


def assert_alone(told):
    """Nobody had any of what was to be absent."""
    roots = {name.partition(".")[0] for name in told["modules"]}
    assert not told["present"] and not roots & {"kvtrain", "lightning", "datasets", "liger_kernel"}


def test_two_models_open_in_one_process_without_kvtrain_and_are_saved_with_their_code(tmp_path):
    models = {"dmc": cached("dmc"), "classifier": transnormer("SequenceClassification")}
    heads, prepared = {"dmc": "CausalLM", "classifier": "SequenceClassification"}, {}
    for name, model in models.items():
        prepared[name] = prepare(tmp_path / name, model, heads[name], again=tmp_path / f"{name}-again")
    told = read([tmp_path / name for name in models], tmp_path)
    assert_alone(told)
    for name, model in models.items():
        written, expected = prepared[name]
        assert_opens(told, tmp_path / name, model, expected)
        again = tmp_path / f"{name}-again"
        assert {path.name for path in again.glob("*.py")} == {path.name for path in written}
        for path in [*written, tmp_path / name / "config.json"]:
            assert (again / path.name).read_bytes() == path.read_bytes()
    size = sum(path.stat().st_size for path in prepared["dmc"][0])
    print(f"DMC's code: {len(prepared['dmc'][0])} files, {size / 1024:.0f} KiB")


@pytest.mark.parametrize("name", thinned(MAIN, SOME_MAIN))
def test_every_file_is_one_that_transformers_takes(tmp_path, name):
    """It copies what it finds named by a pattern, and looks for every package that is named outside of ``try``."""
    config = cached(name).config
    code = remote_code(config)
    for file, text in code.items():
        (tmp_path / file).write_text(text)
    assert list(code) == sorted(code) and SHIM.name in code
    for path in tmp_path.iterdir():
        assert set(dynamic_module_utils.get_imports(path)) <= PRESENT
        assert {f"{found}.py" for found in dynamic_module_utils.get_relative_imports(path)} <= code.keys()
        first, second = path.read_text().splitlines()[:2]
        assert first.startswith(f"# From kvtrain {kvtrain.__version__}, kvtrain.")
        assert second.endswith("SPDX-License-Identifier: Apache-2.0")
    taken = {Path(found).name for found in dynamic_module_utils.get_relative_import_files(tmp_path / SHIM.name)}
    assert {SHIM.name, *taken} == code.keys()


def test_two_writes_are_byte_for_byte_equal_also_into_a_folder_without_the_names(tmp_path):
    cached("lckv").save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    saved = json.loads((tmp_path / "two" / "config.json").read_text())
    del saved["auto_map"]
    (tmp_path / "two" / "config.json").write_text(json.dumps(saved))
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert write_remote_code(folder, AutoConfig.from_pretrained(folder))
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


WRITER = """
import sys
from pathlib import Path
from transformers import AutoConfig
import kvtrain
from kvtrain.export.remote_code import write_remote_code
for folder in map(Path, sys.argv[1:]):
    write_remote_code(folder, AutoConfig.from_pretrained(folder))
"""


@pytest.mark.roads
def test_another_process_writes_the_same(tmp_path):
    """In which sets have another order."""
    folders = {name: tmp_path / name for name in MAIN}
    for name, folder in folders.items():
        cached(name).save_pretrained(folder)
    environment = {**os.environ, "PYTHONHASHSEED": "3"}
    subprocess.run([sys.executable, "-c", WRITER, *map(str, folders.values())], check=True, cwd=ROOT, env=environment)
    for name, folder in folders.items():
        assert {path.name: path.read_text() for path in folder.glob("*.py")} == remote_code(cached(name).config)


def test_kvtrain_opens_such_a_folder_itself(tmp_path):
    model = cached("duo")
    model.save_pretrained(tmp_path)
    for path in write_remote_code(tmp_path, model.config):
        path.write_text(f"raise AssertionError('{path.name} was run')\n")
    for trust in (None, False, True):
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)) is type(model)
    assert type(kvtrain.load(tmp_path)) is type(model)


def test_a_plain_host_needs_no_code(tmp_path):
    host = make_host("llama", dtype=torch.float32)
    host.save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert write_remote_code(tmp_path, host.config) == []
    assert sorted(tmp_path.iterdir()) == before


def test_exports_carry_it_and_the_card_says_how(tmp_path):
    write_run(tmp_path / "run", kvtrain.DMC())
    write_run(tmp_path / "plain", kvtrain.Full())
    folder = export_run(tmp_path / "run", tmp_path / "out", with_code=True)
    expected = remote_code(AutoConfig.from_pretrained(folder))
    assert {path.name: path.read_text() for path in folder.glob("*.py")} == expected
    card = card_of(folder)
    assert 'trust_remote_code=True, revision="<the 40 digits' in card and "library_name: transformers" in card
    assert "import kvtrain" in card and "where kvtrain is installed. That runs" not in card
    plain = export_run(tmp_path / "plain", tmp_path / "host", with_code=True)
    assert not list(plain.glob("*.py")) and "trust_remote_code" not in card_of(plain)


def shared_packages(*names):
    """What distributions and all that they require have put beside each other, by its path."""
    found, ahead = set(), [*names]
    while ahead:
        name = ahead.pop().lower()
        if name not in found:
            found.add(name)
            wanted = map(Requirement, importlib.metadata.requires(name) or ())
            needed = {one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})}
            ahead += [one for one in needed if any(importlib.metadata.distributions(name=one))]
    tops = {
        file.locate().parents[len(file.parts) - 2] if len(file.parts) > 1 else file.locate()
        for name in found
        for file in importlib.metadata.files(name) or ()
        if file.parts[0] not in ("..", "__pycache__")
    }
    return sorted(Path(top) for top in tops)


@pytest.mark.roads
def test_a_real_environment_of_torch_and_transformers_alone(tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    (tmp_path / "shared").mkdir()
    for path in shared_packages("torch", "transformers"):
        (tmp_path / "shared" / path.name).symlink_to(path)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(f"{tmp_path / 'shared'}\n")
    absent = ("kvtrain", "lightning", "datasets", "liger_kernel")
    assert not [name for name in absent if (tmp_path / "shared" / name).exists()]
    models = {f"cache-{name}": (cached(name), "CausalLM") for name in CACHES}
    models |= {f"family-{family}": (cached("dmc", family), "CausalLM") for family in FAMILIES}
    models |= {f"head-{head}": (transnormer(head), head) for head in HEADS}
    models["host"] = (make_host("llama", dtype=torch.float32), "CausalLM")
    # As a download leaves them: of such a repository transformers looks at the imports of every file.
    expected = {}
    for name, (model, head) in models.items():
        snapshot = tmp_path / f"models--org--{name}" / "snapshots" / COMMIT
        snapshot.parent.mkdir(parents=True)
        snapshot.symlink_to(tmp_path / name)
        expected[name] = prepare(tmp_path / name, model, head, repository=f"org/{name}")[1]
    told = read([tmp_path / name for name in models], tmp_path, tmp_path / "venv" / "bin" / "python", "bare")
    assert_alone(told)
    for name, (model, _) in models.items():
        assert_opens(told, tmp_path / name, model, expected[name], plain=name == "host")
