"""CPU kernels, written in C++ (folder `native`)."""
