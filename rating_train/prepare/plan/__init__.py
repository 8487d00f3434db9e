"""Which listings are taken, in which split and order; out of core."""
