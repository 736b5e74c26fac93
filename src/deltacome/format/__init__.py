"""The artifact: what is on disk and what it means. Needs torch and safetensors only."""
