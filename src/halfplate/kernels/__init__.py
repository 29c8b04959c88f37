"""Native code: C++ sources, their Python binding and the choice of the instruction set at run time."""
