"""Adapters for Transformer-VQ, by family: from names and layouts of vectors to public modules."""

from .core import dense_equiv, docmask, quantizer, units
from .data import data_pipeline
from .net import model, opt_model
from .sublayer import attn, opt_attn
from .training import optimizer, schedules, trainstep

FAMILIES = {
    "units": units,
    "quantizer": quantizer,
    "dense_equiv": dense_equiv,
    "docmask": docmask,
    "attn": attn,
    "opt_attn": opt_attn,
    "model": model,
    "opt_model": opt_model,
    "optimizer": optimizer,
    "schedules": schedules,
    "trainstep": trainstep,
    "data_pipeline": data_pipeline,
}
