"""The machine that runs the program: memory, threads, control groups, files, sizes."""
