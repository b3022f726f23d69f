"""The command line: this package's flags, and checks of combinations with Megatron's flags."""
