"""Conversion of checkpoints between Hugging Face safetensors and Megatron's torch_dist format."""
