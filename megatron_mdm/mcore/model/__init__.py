"""The model: Megatron's layers with bidirectional attention, and the head at masked positions."""
