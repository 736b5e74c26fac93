"""A plugin for vLLM: artifacts as models of the OpenAI API, many over one base.

vLLM serves many LoRA adapters over one base already. Requests that name their model, `/v1/models`,
loading at run time, the scheduler's limit on adapters in a batch, the prefix cache that keeps their
blocks apart: all of that stays vLLM's, and an artifact is to it an adapter like any other. Ours is
what a slot holds and what is computed with it: the packed terms of every tensor, norms, embeddings and
head among them, in place of vLLM's low-rank pairs.

This room alone imports vLLM, and `compat` names everything of it that is not a public interface.
"""
