"""Adapters for Transformer-VQ: names and layouts of the vectors to public modules, family by family."""

from .core import dense_equiv, quantizer, units
from .data import data_pipeline
from .net import model, opt_model
from .sublayer import attn, opt_attn
from .training import optimizer, schedules, trainstep

FAMILIES = {
    "units": units,
    "quantizer": quantizer,
    "dense_equiv": dense_equiv,
    "docmask": dense_equiv,
    "attn": attn,
    "opt_attn": opt_attn,
    "model": model,
    "opt_model": opt_model,
    "optimizer": optimizer,
    "schedules": schedules,
    "trainstep": trainstep,
    "data_pipeline": data_pipeline,
}
