"""Bytes become rows: paths, compressed streams, kinds of files, the fields of a row."""
