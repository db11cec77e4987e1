"""What happens to visual tokens: VisionZip, ShortV and the transformers classes that carry them."""
