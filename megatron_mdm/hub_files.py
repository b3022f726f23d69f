"""Names of directories with Hugging Face files in a checkpoint."""

# Directory in which a converted checkpoint keeps config.json and the tokenizer.
HUB_FILES = "huggingface"
# Directory in which transformers keeps the chat templates of a tokenizer besides the default one.
CHAT_TEMPLATES = "additional_chat_templates"
