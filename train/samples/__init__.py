"""`lintime sample`: what a person sees of a model, as text, pictures and files."""
