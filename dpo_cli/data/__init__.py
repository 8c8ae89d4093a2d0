"""From rows in files to a plan of micro-batches: records, formats, sources, tokens, the prepared folder, the plan."""

import os

# Arrow's other allocators reserve a gibibyte at a time, which a bound on memory would count as asked for. Arrow reads
# this when it is imported.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
