"""How it is measured: time, memory, gradient errors, and the processes that all of it runs in."""
