"""The check of the data: what is compared, measured and reported of prepared pairs."""
