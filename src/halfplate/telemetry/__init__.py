"""Progress, the log in the result folder, and the description of the machine."""
