"""The study: clusterings of frozen features, compared without labels."""
