"""Store the visual tokens of a frozen vision tower once, so that training runs the decoder alone."""
