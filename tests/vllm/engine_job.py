"""One vLLM engine in a process of its own: reads a job as JSON, writes what came out as JSON.

    python -m tests.vllm.engine_job < job.json

A job has ``folder``, ``options`` of ``LLM``, and ``rounds``: lists of prompts, which are lists of tokens and are asked
together. What comes out has ``tokens``, a list a round, and figures of the engine. A job may have ``refused`` instead,
pairs of a folder and options, and what vLLM's configuration says to each comes out.
"""

import json
import sys
import time

MARK = "ENGINE-JOB "  # before the line that is the answer, among whatever vLLM says


def main() -> None:
    """Run the job on standard input."""
    job = json.load(sys.stdin)
    answer = _refusals(job["refused"]) if "refused" in job else _run(job)
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)


def _refusals(pairs: list) -> list[str]:
    """What is said to each folder and options, or that nothing is."""
    from vllm import EngineArgs

    said = []
    for folder, options in pairs:
        try:
            EngineArgs(model=folder, dtype="float32", **options).create_engine_config()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def _run(job: dict) -> dict:
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "disable_log_stats": False}
    engine = LLM(job["folder"], **{**options, **job.get("options", {})})
    sampling = SamplingParams(temperature=0.0, max_tokens=job.get("new_tokens", 48), ignore_eos=True)
    tokens, seconds, cached = [], [], []
    for prompts in job["rounds"]:
        begin = time.process_time()
        answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        seconds.append(time.process_time() - begin)
        tokens.append([list(answer.outputs[0].token_ids) for answer in answers])
        cached.append(sum(answer.num_cached_tokens or 0 for answer in answers))
    cache = engine.llm_engine.vllm_config.cache_config
    metrics = {one.name: one.value for one in engine.get_metrics() if hasattr(one, "value")}
    figures = {"num_blocks": cache.num_gpu_blocks, "block_size": cache.block_size, "seconds": seconds, "cached": cached}
    core = engine.llm_engine.engine_core
    if hasattr(core, "engine_core"):  # it lies in this process
        figures |= _memory(core.engine_core)
    preemptions = int(metrics.get("vllm:num_preemptions", 0))
    return {"tokens": tokens, "preemptions": preemptions, **figures}


def _memory(core) -> dict:
    """Bytes of the caches' storages, and the groups of layers of which a block has a page each."""
    caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
    tensors = [one for cache in caches for one in (cache if isinstance(cache, tuple | list) else [cache])]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    groups = [
        {
            "layers": len(group.layer_names),
            "kind": type(group.kv_cache_spec).__name__,
            "page": group.kv_cache_spec.page_size_bytes,
            "tokens": group.kv_cache_spec.block_size,
        }
        for group in core.scheduler.kv_cache_config.kv_cache_groups
    ]
    return {"groups": groups, "allocated": sum(storages.values())}


if __name__ == "__main__":
    main()
