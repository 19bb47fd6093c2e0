"""What is sent: each kind of case is made from a seed and a number alone."""
