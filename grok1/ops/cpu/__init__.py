"""CPU kernels, written in C++ (directory `native`)."""
