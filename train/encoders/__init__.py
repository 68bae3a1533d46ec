"""Networks that turn images and texts into what others train on, loaded for use."""
