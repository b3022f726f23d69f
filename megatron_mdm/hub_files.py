"""Names in a directory of tokenizer files that a checkpoint brings."""

# Where a converted checkpoint keeps config.json and the tokenizer.
HUB_FILES = "huggingface"
# Directory in which transformers keeps a tokenizer's chat templates other than the default.
CHAT_TEMPLATES = "additional_chat_templates"
