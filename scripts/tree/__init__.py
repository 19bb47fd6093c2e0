"""The shape of the code: measured, checked against its declared order, drawn."""
