"""`longrl bench step`: one GRPO step of one prompt along several paths, with the same weights and samples."""
