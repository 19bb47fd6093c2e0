"""The faults, a table a subject: what each is, the function that injects it, where it shows."""
