"""Native code: C++ sources, their binding and the choice of instruction set at run time."""
