"""Bytes: the device and host arenas, the ssd tier, and the one accountant of them all."""
