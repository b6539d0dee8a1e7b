"""Text and tokens: tokenizers, prompts, stop sequences."""
