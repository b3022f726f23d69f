"""The command line: our flags, Megatron's, and what does not go together."""
