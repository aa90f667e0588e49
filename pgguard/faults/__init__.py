"""What is wrong, how grave it is, what is said and done about it: no I/O, no clock."""
