"""What each system gives to the training step; `table` says which task trains which net."""
