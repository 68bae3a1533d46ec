def optimizer(r): raise NotImplementedError
def schedules(r): raise NotImplementedError
def trainstep(r): raise NotImplementedError
