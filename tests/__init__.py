"""The tests of pgguard, room by room, and as a whole against real servers and drivers."""
