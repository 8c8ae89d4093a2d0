"""The prepared folder, and the plan of steps over its pairs."""
