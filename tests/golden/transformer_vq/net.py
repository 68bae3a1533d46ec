def model(r): raise NotImplementedError
def opt_model(r): raise NotImplementedError
