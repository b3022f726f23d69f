"""Masked-diffusion language-model training for NVIDIA Megatron."""

__version__ = "0.1.0"
