"""What the operating system is asked for: folders that are whole or absent, locks, signals, bounds, processes."""
