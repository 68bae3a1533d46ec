"""Transformer-VQ (arXiv 2309.16354)."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerVQConfig:
    """Transformer-VQ language model.

    Attributes:
        vocab_size: size of the token vocabulary (bytes: 259).
        d_model: residual width D.
        n_layer: layers; a layer is two attention sublayers (shga) or attention + MLP (mqa, mha).
        head_type: "shga" (gated, `n_head` heads), "mqa" or "mha" (D/d_k query heads, MLP).
        n_head: heads of the gated type; ignored by mqa/mha, whose count is D // d_k.
        d_k, d_v: key and value width per head; d_v applies to shga only, 0 = 2*D/n_head.
        n_code: codes S per key-value head.
        block_len: block length L; the function computed does not depend on it.
        mem_len: uncompressed window M before the block; position bias reaches this far.
        attention: "vq", or the quadratic baselines "dense" (unquantised keys, relative position bias
            at every distance) and "flash" (unquantised keys, no relative bias, fused attention).
        cache: attend to the compressive cache (False: sliding window of M keys).
        grad_through_cache: let gradients flow into keys and values of earlier blocks.
        reduction: "serial", "associative" or "matmul": how the cache recurrence is computed.
        mask_documents: keys of other documents are invisible (the reference lets them through).
        norm_affine: gain and bias in the input and output norms.
        pe_abs: add scaled absolute sinusoids to the embeddings.
        pe_lam: largest wavelength of the sinusoids.
        tie_embeddings, out_norm, logit_scale: output head; logit_scale multiplies "logits" (including
            the bias) or "features" as `scale_on` says; tied_bias adds a bias to a tied head.
        dropout_*: rates for embeddings, the sinusoid table, residual branches and whole sublayers.
        commit_weight: coefficient of the commitment loss.
        codebook_decay: EMA decay gamma of the codebook.
        revive_below: codes whose EMA count falls under this are re-seeded from current keys; 0 = never.
    """

    vocab_size: int = 259
    d_model: int = 768
    n_layer: int = 24
    head_type: str = "shga"
    n_head: int = 1
    d_k: int = 128
    d_v: int = 0
    n_code: int = 512
    block_len: int = 512
    mem_len: int = 512
    attention: str = "vq"
    cache: bool = True
    grad_through_cache: bool = True
    reduction: str = "associative"
    mask_documents: bool = False
    norm_affine: bool = True
    pe_abs: bool = False
    pe_lam: float = 100_000.0
    tie_embeddings: bool = False
    tied_bias: bool = True
    out_norm: bool = False
    logit_scale: float = 1.0
    scale_on: str = "logits"
    dropout_emb: float = 0.0
    dropout_sin: float = 0.0
    dropout_res: float = 0.0
    dropout_layer: float = 0.0
    commit_weight: float = 1e-4
    codebook_decay: float = 0.99
    revive_below: float = 0.0
