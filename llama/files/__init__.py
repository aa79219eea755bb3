"""Containers without meaning: mapped files, JSON, GGUF, safetensors, torch's zip. None of them is trusted."""
