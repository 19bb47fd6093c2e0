"""The fault table: each fault injected for real into the whole product while callers ask.

A fault is a row of one of the tables in `rows/` (`FAULTS`): what it is, the function that injects
it, where it shows. `servers/` has what can be hurt beside the product's own processes.
"""
