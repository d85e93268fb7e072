"""Meshes, shardings, compilers and what hardware a program runs on."""
