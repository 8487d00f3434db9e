"""Images in tiles, as the processor of stock SmolVLM cuts them: pixels, prompt, collation."""
