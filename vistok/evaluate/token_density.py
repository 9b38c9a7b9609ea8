"""TokDense: accuracy per visual token."""

from __future__ import annotations


def tokdense(accuracy: float, tokens: float) -> float:
    """Accuracy bought by each visual token (VQToken, arXiv 2503.16980): 57.46 % with 32 tokens is 1.796.

    Args:
        accuracy: In percent, 0..100.
        tokens: Visual tokens that reach the language model, on average. The paper leaves the closing newline out.

    Raises:
        ValueError: No tokens, or an accuracy that is no percentage.
    """
    if not 0 <= accuracy <= 100:
        raise ValueError(f"accuracy={accuracy}: it is a percentage, 0..100.")
    if tokens <= 0:
        raise ValueError(f"tokens={tokens}: a density needs at least one token; the model without pictures has none.")
    return accuracy / tokens
