"""Work on whole files: completing prompts and scoring texts row by row, resumable."""
