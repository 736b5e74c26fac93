"""Runs engines one after another in a separate process; requests and answers are JSON files.

usage: engine.py JOBS.json SAID.json

A job has a `model`, `options` of `vllm.LLM`, and `ask`: lists of [name, adapter's folder or null, ids].
All prompts of a job form one batch. An answer is [tokens, logprobs of the prompt's tokens] for each, and
how the model ran; or what went wrong.
"""

import json
import multiprocessing
import sys

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.v1.executor import multiproc_executor

OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 64,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "enable_lora": True,
    "distributed_executor_backend": "uni",
    "disable_log_stats": True,
}
WISH = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0, ignore_eos=True)


def run(job):
    llm = LLM(job["model"], **OPTIONS | job["options"])
    names = sorted({name for name, folder, _ in job["ask"] if folder})
    requests = [
        LoRARequest(name, 1 + names.index(name), folder) if folder else None
        for name, folder, _ in job["ask"]
    ]
    prompts = [{"prompt_token_ids": ids} for *_, ids in job["ask"]]
    outputs = llm.generate(prompts, WISH, lora_request=requests, use_tqdm=False)
    said = []
    for (*_, ids), output in zip(job["ask"], outputs, strict=True):
        got = [one[id].logprob for id, one in zip(ids, output.prompt_logprobs, strict=True) if one]
        said.append([list(output.outputs[0].token_ids), got])
    mode = llm.llm_engine.vllm_config.compilation_config.mode
    return {"said": said, "mode": mode.name}


def main():
    # A spawned worker loads vLLM again, which takes half a minute; servers do spawn theirs.
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    said = {}
    for name, job in jobs.items():
        try:
            said[name] = run(job)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
        cleanup_dist_env_and_memory()
    with open(sys.argv[2], "w") as file:
        json.dump(said, file)


if __name__ == "__main__":
    main()
