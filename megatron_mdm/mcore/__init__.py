"""The binding to Megatron: the only folder that imports megatron."""
