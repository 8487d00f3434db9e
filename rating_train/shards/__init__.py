"""The dataset format on disk, without torch: schema, MDS reading and writing, verification."""
