"""What the official projects call the tensors of their compressors, as rules (pattern, our name) applied in order."""

from __future__ import annotations

_ATTENTION = ((r"^clip_attn\.in_proj_", "attn.in_proj."), (r"^clip_attn\.", "attn."))
QUECC = (
    (r"^(?:model\.)?mm_projector\.0\.", ""),
    (r"^(?:model\.)?mm_projector\.1\.", "projector.0."),
    (r"^(?:model\.)?mm_projector\.3\.", "projector.2."),
    *_ATTENTION,
    (r"^text_projection\.", "text."),
    (r"^q_downsample\.", "downsample."),
    (r"^q_proj\.", "query."),
    (r"^k_proj\.", "key."),
    (r"^v_proj\.", "value."),
)
"""`mm_projector.0` is QueCC, `.1` and `.3` are LLaVA's projector."""
TOKENPACKER = (
    (r"^(?:model\.)?mm_projector\.", ""),
    *_ATTENTION,
    (r"^q_proj_1\.", "query.0."),
    (r"^ln_q_1\.", "query.1."),
    (r"^k_proj_1\.", "key."),
    (r"^ln_k_1\.", "key.3."),
    (r"^v_proj_1\.", "value."),
    (r"^ln_v_1\.", "value.3."),
    (r"^mlp\.", "projector."),
)
