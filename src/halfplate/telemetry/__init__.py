"""How a run tells what it does: the progress that a listener hears, the log in the folder of the result, the machine it ran on."""
