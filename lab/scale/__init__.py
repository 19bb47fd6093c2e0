"""A model of the large: many engines behind one gateway, in virtual time and for real."""
