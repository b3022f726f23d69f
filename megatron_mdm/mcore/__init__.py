"""The binding to Megatron: README.md has its parts in the order in which Megatron calls them."""
