"""A trained model put to use: scores for a catalogue (``rating-train predict``) and from Python."""
