"""Shared layers; torch only.

Shape legend, used in every docstring and reshape comment of vistok:
`B` batch, `C/H/W` channels, height and width of a picture, `h/w` height and width of a token grid, `N` tokens,
`M` kept tokens, `K` latent tokens, `D` width, `A` attention heads, `G` groups, `V` vocabulary,
`L` sequence length of a language model.
"""
