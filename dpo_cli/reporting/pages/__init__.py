"""The HTML pages that the program writes: a template and a function each, all on one base."""
