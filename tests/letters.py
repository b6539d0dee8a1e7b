"""A tokenizer for tests of what surrounds tokenizers."""


class Letters:
    """A tokenizer with a token for each character."""

    def encode(self, text):
        return [(ord(character) - 48) % 1000 for character in text]

    def count_bytes(self, ids, first=0):
        return len(ids) - first

    def stream(self, prompt):
        return self

    def push(self, token):
        return chr(token + 48)

    def flush(self):
        return ""
