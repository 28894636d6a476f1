"""Self-supervised encoders and their features, trained and extracted without labels."""
