"""Kernels of our own for CPUs, in C++ (``docs/decisions/cpu.md``)."""
