"""The shared decoder and its parts: Transformer, next-token decoding, image tokenizer, prompts, loading."""
