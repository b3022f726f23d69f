"""The method, in torch, NumPy and SciPy, without Megatron."""
