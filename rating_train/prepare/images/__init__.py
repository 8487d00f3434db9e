"""Images of listings: where they are, fetching them, the stored square."""
