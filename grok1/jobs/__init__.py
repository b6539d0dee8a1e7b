"""Resumable jobs over files: completing prompts and scoring texts."""
