"""What talks to the machine: files, signals, the network; it knows nothing of SAEs."""
