"""Stable training of masked-diffusion language models on NVIDIA Megatron."""

__version__ = "0.1.0"
