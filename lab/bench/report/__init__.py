"""A run of the benchmark as it is kept, shown and held against an earlier one."""
