"""The binding to Megatron. README.md lists its parts in the order in which Megatron calls them."""
