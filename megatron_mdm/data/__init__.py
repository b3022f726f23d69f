"""From text to Megatron's indexed datasets: tokenizer training and tokenization."""
