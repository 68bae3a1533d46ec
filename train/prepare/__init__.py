"""`lintime prepare`: what is computed once, ahead of training."""
