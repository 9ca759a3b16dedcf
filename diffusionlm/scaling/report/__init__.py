"""The report of a sweep: a page, plots, tables and numbers."""
