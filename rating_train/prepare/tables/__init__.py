"""Files with a schema, Parquet and Arrow, and the images that their rows hold."""
