"""An interpreter of saved Core ML programs (MIL), in numpy, so that they can be checked without a Mac."""
