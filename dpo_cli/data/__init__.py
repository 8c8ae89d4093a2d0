"""From rows in files to a plan of micro-batches: records, formats, sources, tokens, the prepared folder, the plan."""
