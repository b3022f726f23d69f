"""The method: torch and NumPy only, without Megatron."""
