"""`lintime convert` and `lintime flexify`: weights of other layouts, and nets made of nets."""
