"""What every other package may use: options, files, locks, the terminal, operators."""
