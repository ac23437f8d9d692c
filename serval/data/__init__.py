"""Text to tokens to packed batches; synthetic long-context tasks; tokenizer training."""
