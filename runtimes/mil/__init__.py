"""Executes the MIL program of a Core ML package with numpy, so that it can be checked without a Mac."""
