"""The checkpoint on disk: its file table, a reader that never unpickles, and a writer of random weights."""
