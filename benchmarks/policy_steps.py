"""What policies cost: a decoding step behind a long prompt, and reading the prompt, against the full cache in turns.

The packaged model in float32, 8 rows of 1,024 tokens, CPU time of one thread; ratios of medians. A step of a policy
attends what it has kept, where the full cache attends everything: what deciding costs is paid from that.

    python benchmarks/policy_steps.py [--full]
"""

import argparse
import functools
from typing import Any

import torch
from contenders import plain_host, random_ids
from turns import at_most, cpu_seconds, decoding, machine, median_seconds

import kvtrain
from kvtrain.models.method import Method

ROWS, TOKENS, WARM_UP = 8, 1024, 3
POLICIES: dict[str, Method] = {
    "streamingllm": kvtrain.StreamingLLM(budget=256),
    "h2o every 16": kvtrain.H2O(budget=256, every=16),
    "h2o": kvtrain.H2O(budget=256),
    "tova": kvtrain.TOVA(budget=256),
    "snapkv": kvtrain.SnapKV(budget=256, recent=32, every=32),
    "d2o": kvtrain.D2O(budget=256),
    "mikv": kvtrain.MiKV(budget=256),
    "random": kvtrain.RandomEviction(budget=256),
    "4 bits": kvtrain.Full(kv_bits=4),
    "gear": kvtrain.GEAR(),
    "kivi": kvtrain.KIVI(),
}
STEP_BARS, PROMPT_BARS = {"h2o every 16": 1.0, "h2o": 1.6}, {"h2o": 1.7}


def read_prompt(model: Any, ids: torch.Tensor) -> Any:
    """The cache behind prompts ``(B, T)``, which are over."""
    cache = model.make_cache()
    model(ids, past_key_values=cache, prefill=True, logits_to_keep=1)
    cache.end_prompt()
    return cache


def report(times: dict[str, float], bars: dict[str, float], what: str) -> None:
    """Print a line a contender."""
    print(f"{what}:")
    for name, seconds in times.items():
        ratio = seconds / times["full"]
        said = at_most(ratio, bars.get(name))
        print(f"  {name:14} {1e3 * seconds:8.1f} ms, {ratio:.2f} of the full cache's{said}")


@torch.no_grad()
def main() -> None:
    """Print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="three times as many steps, and prompts read five times")
    parser.add_argument("--policies", nargs="+", default=[*POLICIES], choices=POLICIES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {"full": kvtrain.Full(), **{name: POLICIES[name] for name in arguments.policies}}
    models = {name: kvtrain.retrofit(plain_host(), method) for name, method in chosen.items()}
    ids = random_ids(ROWS, TOKENS)
    print(f"{ROWS} rows of {TOKENS} tokens, budgets of 256 slots a head; {machine()}")
    caches = {name: read_prompt(model, ids) for name, model in models.items()}
    steps = {name: decoding(model, caches[name], ROWS) for name, model in models.items()}
    report(median_seconds(steps, WARM_UP, 96 if arguments.full else 32, cpu_seconds), STEP_BARS, "a decoding step")
    prompts = {name: functools.partial(read_prompt, model, ids) for name, model in models.items()}
    report(median_seconds(prompts, 1, 5 if arguments.full else 1, cpu_seconds), PROMPT_BARS, "reading the prompts")


if __name__ == "__main__":
    main()
