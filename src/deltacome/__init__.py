"""Deltacome: many full fine-tunes of one LLM for little more than the price of one."""
