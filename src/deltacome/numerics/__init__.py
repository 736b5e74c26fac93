"""Tensors in, tensors out: grids, GPTQ, singular triples, grams."""
