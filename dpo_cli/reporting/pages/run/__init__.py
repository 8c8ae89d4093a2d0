"""The page of one run or of several: curves, sections, and what is written into their templates."""
