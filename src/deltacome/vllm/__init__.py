"""A plugin for vLLM: artifacts as models of the OpenAI API, many over one base.

vLLM already serves many LoRA adapters over one base. Requests that name their model, `/v1/models`,
loading at run time, the scheduler's limit on adapters in a batch, the prefix cache that keeps their
blocks apart: all of that stays vLLM's, and to vLLM an artifact is an adapter like any other. The plugin
decides what a slot holds and what is computed with it: the packed terms of every tensor, including norms,
embeddings and head, in place of vLLM's low-rank pairs.

Only this package imports vLLM, and `compat` names everything in vLLM that is not a public interface.
"""
