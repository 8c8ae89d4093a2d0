"""The jobs, told as plain sequences. The only place that wires the rooms together; it is imported late, with torch."""
