"""`lintime bench`: what it measures and how it shows it."""
