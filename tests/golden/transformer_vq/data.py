"""Family data_pipeline: packing, evaluation batches, image and byte tokens."""

from __future__ import annotations

import re

from lintime.train.data import ByteVocab, evaluation_batches, image_tokens, pack_documents

from ..compare import Report

FIELDS = {"inputs": "inputs", "targets": "targets", "doc_ids": "segment_ids", "loss_mask": "mask"}


def data_pipeline(report: Report) -> None:
    """Documents as sequences, with and without EOS and remainder; all compared exactly."""
    config = report.case.config
    found = (re.fullmatch(r"doc(\d+)", name) for name in report.case.arrays)
    numbers = sorted(int(match[1]) for match in found if match)
    documents = [report.input(f"doc{i}") for i in numbers]
    for name in sorted(report.case.arrays):
        match = re.fullmatch(r"(main|opt)_(eval|train_sequences)_eos([01])_(\w+)", name)
        if not match or match[4] not in FIELDS:
            continue
        branch, kind, eos, field = match.groups()
        drop = branch == "opt" and kind != "eval"
        result = pack_documents(
            documents, config["sequence_len"], append_eos=eos == "1", drop_remainder=drop
        )
        if kind == "eval":
            result = evaluation_batches(result, config["batch_size"])
        report.check(name, result[FIELDS[field]])
    for name, rest in report.matching("image"):
        if rest.endswith("_tokens"):
            report.check(name, image_tokens(report.input(name.removesuffix("_tokens"))))
    for name, rest in report.matching("text"):
        if rest.endswith("_tokens"):
            text = report.input(name.replace("_tokens", "_utf8")).tobytes()
            report.check(name, ByteVocab().encode(text))
    specials = {"pad_id": ByteVocab.pad, "eos_id": ByteVocab.eos}
    for key, value in specials.items():
        if config.get(key, value) != value:
            report.fail(key, f"{config[key]} is not supported, only {value}")
