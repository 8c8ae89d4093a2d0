"""From tokens to log-probabilities: loading, batches, the chunked vocabulary projection, the scorer."""
