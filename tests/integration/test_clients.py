"""Programs that know nothing of kvtrain open an exported folder: a server, an evaluation suite, adapters."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from urllib.error import URLError

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

import kvtrain
from kvtrain.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.roads

PROMPT = "def area(width, height):\n"
TEXTS = [
    "def area(width, height):\n    return width * height\n",
    "class Stack:\n    def __init__(self):\n        pass\n",
]
TASK = """
task: short_texts
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
ADAPTED = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM
assert "kvtrain" not in sys.modules
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    output = model(torch.tensor([json.loads(sys.argv[2])]), use_cache=True)
print(json.dumps([type(output.past_key_values).__name__, output.logits[0, -1].tolist()]))
"""


@pytest.fixture(scope="module")
def model():
    return kvtrain.retrofit(kvtrain.load("kvtrain:tiny", dtype=torch.float32), kvtrain.DMC()).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("clients") / "tiny-dmc"
    model.save_pretrained(path)
    load_tokenizer("kvtrain:tiny").save_pretrained(path)
    return path


@pytest.fixture
def environment(root, tmp_path):
    """Of a process that can import kvtrain, writes nowhere but here, and asks nobody."""
    ours = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_DATASETS_CACHE": str(tmp_path / "data")}
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **ours, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run(arguments, environment):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@contextmanager
def serving(folder, environment, log):
    """The address of a ``transformers serve`` that has the folder open."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    options = ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", port]
    with log.open("w") as output:
        server = subprocess.Popen([*program, "serve", folder, *options], env=environment, stdout=output, stderr=output)
        with server:
            try:
                yield wait(server, f"http://127.0.0.1:{port}", log)
            finally:
                server.kill()


def wait(server, address, log):
    for _ in range(400):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return address
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


@pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
def test_transformers_serve_answers(folder, model, environment, tmp_path):
    body = {"model": str(folder), "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    with serving(folder, environment, tmp_path / "log") as address:
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            said = json.load(answer)["choices"][0]["text"]
    tokenizer = load_tokenizer("kvtrain:tiny")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert said == tokenizer.decode(expected, skip_special_tokens=True)


def log_likelihood(model, text):
    """Of a whole text, as lm-eval takes it: the first token follows the one that ends texts."""
    ids = load_tokenizer("kvtrain:tiny")(text, return_tensors="pt", add_special_tokens=False).input_ids
    fed = torch.cat([torch.tensor([[model.config.eos_token_id]]), ids], 1)
    with torch.no_grad():
        scores = model(fed[:, :-1]).logits.log_softmax(-1)
    return scores.gather(-1, ids[..., None]).sum().item()


def test_lm_eval_opens_the_folder(folder, model, environment, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "task.yaml").write_text(TASK.replace("TEXTS", str(tmp_path / "texts.jsonl")))
    arguments = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    chosen = ["--tasks", "short_texts", "--include_path", tmp_path, "--output_path", tmp_path / "out"]
    done = run(["-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, *chosen], environment)
    assert "neither marked" not in done.stderr + done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["short_texts"]["byte_perplexity,none"]
    total = sum(log_likelihood(model, text) for text in TEXTS)
    expected = torch.tensor(-total / sum(len(text.encode()) for text in TEXTS)).exp().item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_an_adapter_opens_its_base(folder, environment, tmp_path):
    peft = pytest.importorskip("peft")
    base = kvtrain.load(folder)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = list(range(5, 25))
    done = run(["-c", ADAPTED, tmp_path / "adapter", json.dumps(ids)], environment)
    kind, logits = json.loads(done.stdout.splitlines()[-1])
    assert kind == "KVCache"
    with torch.no_grad():
        expected = adapted(torch.tensor([ids]), use_cache=True).logits[0, -1]
    torch.testing.assert_close(torch.tensor(logits), expected.float(), atol=1e-4, rtol=1e-4)
