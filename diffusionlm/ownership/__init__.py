"""Which process has a directory or a cell of a sweep: leases, and claims that are made of them."""
