"""Conversion between Hugging Face checkpoints (safetensors) and Megatron's distributed checkpoints."""
