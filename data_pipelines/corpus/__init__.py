"""A built corpus: rows decoded, deduplicated, held apart from evaluation sets and tokenised, in ArrayRecord."""
