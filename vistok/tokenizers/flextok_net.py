"""FlexTok's two networks: causal registers over patches, and a velocity field over patches and registers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vistok.flow import TimeEmbedding
from vistok.layers.attention import float32_linear
from vistok.layers.modulation import Modulation, modulate
from vistok.layers.position import sincos_table
from vistok.tokenizers.flextok_blocks import PATCHES, FlexTransformer, Group, Layout, Size, plain_norm


def to_patches(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, h * w, size * size * C): patches row-major, inside a patch row, column, channel."""
    x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def from_patches(x: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `to_patches`."""
    x = x.unflatten(2, (size, size, -1)).unflatten(1, grid)  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class PatchEmbed(nn.Module):
    """Linear patch embedding plus a fixed sin-cos table, cropped at its top left to the grid at hand.

    Args:
        channels: Channels of the map.
        size: Side of a patch.
        dim: Width, D.
        table: (h, w) of the table, the largest grid.
    """

    position: Tensor

    def __init__(self, channels: int, size: int, dim: int, table: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.proj = nn.Linear(size * size * channels, dim)
        self.register_buffer("position", sincos_table(dim, table))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h * w, D)."""
        grid = x.shape[-2] // self.size, x.shape[-1] // self.size
        table = self.position[:, : grid[0], : grid[1]].flatten(1).T  # (h * w, D)
        x = to_patches(x.to(self.proj.weight.dtype), self.size)
        return self.proj(x) + table.to(self.proj.weight.dtype)


class RegisterEncoder(nn.Module):
    """Patches see patches; register m sees all patches and registers 0..m, so a prefix does not depend on the rest.

    Args:
        channels: Channels of the latents.
        patch: Side of a patch.
        table: Largest grid (h, w).
        num_tokens: Registers, K.
        size: Shape of the transformer.
        out_dim: Channels of the features for the quantizer.
    """

    def __init__(
        self,
        channels: int,
        patch: int,
        table: tuple[int, int],
        num_tokens: int,
        size: Size,
        out_dim: int,
    ) -> None:
        super().__init__()
        width = size.width
        self.patch_embed = PatchEmbed(channels, patch, width, table)
        self.registers = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_tokens, width), std=0.02))
        self.transformer = FlexTransformer(width, size.depth, size.heads, modulated=False)
        self.head = nn.Linear(width, out_dim)

    def forward(self, latents: Tensor, num_tokens: int | None = None) -> Tensor:
        """Latents (B, C, H, W) -> features (B, K, out_dim), float32; the first `num_tokens` alone cost less."""
        patches = self.patch_embed(latents)  # (B, P, D)
        registers = self.registers[:num_tokens].expand(len(latents), -1, -1)
        count, p, r = len(latents), patches.shape[1], registers.shape[1]
        layout = Layout(p, (Group(count, r, causal_mask(p, r, latents.device)),))
        rows = torch.cat([patches.flatten(0, 1), registers.flatten(0, 1).to(patches.dtype)])
        x, _ = self.transformer(rows, layout)
        return float32_linear(plain_norm(x[layout.border :]), self.head).unflatten(0, (count, r))


def causal_mask(patches: int, registers: int, device: torch.device | None = None) -> Tensor:
    """True where query i may see key j: j is a patch, or j <= i; (P + R, P + R)."""
    order = torch.arange(patches + registers, device=device)
    return (order < patches) | (order <= order[:, None])


class VelocityDecoder(nn.Module):
    """The flow's network: noised patches and code registers attend to each other, time enters by adaptive layer norms.

    Masked positions are replaced after the position is added, so all of them are one and the same vector; with full
    attention they stay the same through every block, and one of them, its attention logit raised by the logarithm of
    their number, stands for all (`Condition`).

    Args:
        channels: Channels of the latents.
        patch: Side of a patch.
        table: Largest grid (h, w).
        num_tokens: Registers, K.
        code_dim: Channels of a code.
        size: Shape of the transformer.
        learned_null: Whether the empty condition is a learnt vector, zeros if not.
        head_modulation: Whether time shifts and scales the output layer too.
        read: Block whose patch features `forward` gives besides (REPA), counted from 0.
    """

    null_token: Tensor

    def __init__(
        self,
        channels: int,
        patch: int,
        table: tuple[int, int],
        num_tokens: int,
        code_dim: int,
        size: Size,
        *,
        learned_null: bool,
        head_modulation: bool,
        read: int,
    ) -> None:
        super().__init__()
        width = size.width
        self.patch, self.num_tokens, self.read = patch, num_tokens, read
        self.embed = nn.Linear(code_dim, width)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_tokens, width), std=0.02))
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        if learned_null:
            self.null_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        else:
            self.register_buffer("null_token", torch.zeros(width), persistent=False)
        self.patch_embed = PatchEmbed(channels, patch, width, table)
        self.time = TimeEmbedding(width)
        self.transformer = FlexTransformer(width, size.depth, size.heads, modulated=True)
        self.head_modulation = Modulation(width, 2) if head_modulation else None
        self.head = nn.Linear(width, patch * patch * channels)

    def tokens(self, codes: Tensor) -> Tensor:
        """Codes (B, N, code_dim) of the first N positions -> registers (B, N, D)."""
        return self.embed(codes.to(self.embed.weight.dtype)) + self.position[: codes.shape[1]]

    def registers(self, codes: Tensor, lengths: Tensor | None = None, null: Tensor | None = None) -> Tensor:
        """All K registers: codes below a row's length, mask vectors from there on, the null vector in rows of `null`.

        Args:
            codes: (B, N, code_dim), N <= K.
            lengths: Tokens that count, (B,); N if None.
            null: True for rows without condition, (B,).
        """
        x = self.tokens(codes)
        mask_token = self.mask_token.expand(len(x), self.num_tokens - x.shape[1], -1)
        x = torch.cat([x, mask_token.to(x.dtype)], 1)
        x = x if lengths is None else self.masked(x, lengths)
        return x if null is None else torch.where(null[:, None, None], self.null_token.to(x.dtype), x)

    def masked(self, registers: Tensor, lengths: Tensor) -> Tensor:
        """Registers (B, K, D) with mask vectors from each row's length (B,) on."""
        beyond = torch.arange(self.num_tokens, device=registers.device) >= lengths[:, None]
        return torch.where(beyond[..., None], self.mask_token.to(registers.dtype), registers)

    def modulations(self, t: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Vectors of every block (6, T, 2, D) and of the head (T, 2, D) for times (T,)."""
        time = self.time(t)  # (T, D)
        head = None if self.head_modulation is None else self.head_modulation(time)
        return [block.vectors(time) for block in self.transformer.blocks], head

    def forward(self, x: Tensor, t: Tensor, registers: Tensor) -> tuple[Tensor, Tensor]:
        """Output at (x_t (B, C, H, W), t (B,)) given all registers (B, K, D), and patch features of block `read`."""
        groups = (Group(len(x), registers.shape[1]),)
        out, seen = self.run(x, registers.flatten(0, 1), groups, *self.modulations(t), read=self.read)
        assert seen is not None
        return out, seen

    def run(
        self,
        x: Tensor,
        registers: Tensor,
        groups: tuple[Group, ...],
        vectors: Sequence[Tensor],
        head: Tensor | None,
        *,
        read: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The network on groups of sequences that all see the same latents.

        Args:
            x: Noised latents, (B, C, H, W); every group is a multiple of these B.
            registers: Rows of all groups' registers, (rows, D).
            groups: Their lengths and masks.
            vectors: See `modulations`; for one time or for every sequence.
            head: The same for the head.
            read: Block whose patch rows are returned as (S, P, D).

        Returns:
            (S, C, H, W) and the features.
        """
        patches = self.patch_embed(x)  # (B, P, D)
        copies = sum(group.count for group in groups) // len(x)
        layout = Layout(patches.shape[1], groups)
        rows = torch.cat([patches.flatten(0, 1).repeat(copies, 1), registers])
        rows, seen = self.transformer(rows, layout, vectors, read)
        found = plain_norm(rows[: layout.border]).unflatten(0, (-1, layout.patches))  # (S, P, D)
        if head is not None:
            found = modulate(found, head[:, 0, None], head[:, 1, None])
        grid = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        features = None if seen is None else layout.per_kind(seen)[PATCHES]
        return from_patches(self.head(found), self.patch, grid), features


class Condition:
    """What sampling needs of one batch of tokens: short registers with counted masks, and everything time decides.

    Rows of different lengths share one batch: up to the longest length k a shorter row holds its mask vectors, and one
    more mask vector with log(K - k) on its logit stands for the K - k behind. The empty condition is one null vector
    with log K.

    Args:
        decoder: The network.
        codes: (B, N, code_dim), N <= K.
        lengths: Tokens of each row, (B,); N if None.
        times: Times that will be asked for.
        patches: Patches of the latents, P.
    """

    def __init__(
        self, decoder: VelocityDecoder, codes: Tensor, lengths: Tensor | None, times: Sequence[float], patches: int
    ) -> None:
        longest = codes.shape[1] if lengths is None else int(lengths.max())
        registers = decoder.registers(codes[:, :longest], lengths)
        self._prepare(decoder, [(registers, longest)], times, patches)

    def _prepare(
        self, decoder: VelocityDecoder, parts: Sequence[tuple[Tensor, int]], times: Sequence[float], patches: int
    ) -> None:
        """`parts`: all K registers (B, K, D) and how many of them, one group of sequences each."""
        full, batch = decoder.num_tokens, sum(len(registers) for registers, _ in parts)
        self.decoder, self.batch = decoder, batch
        kept = [registers[:, : min(k + 1, full)] for registers, k in parts]
        given = tuple(Group(len(x), x.shape[1], _counted(patches + x.shape[1], full - x.shape[1] + 1, x)) for x in kept)
        like = kept[0]
        null = decoder.null_token.to(like.dtype).expand(batch, -1)
        self.empty = (Group(batch, 1, _counted(patches + 1, full, like)),)
        self.rows = [torch.cat([x.flatten(0, 1) for x in kept]), null]
        self.groups = given
        known = sorted(set(times))
        vectors, head = decoder.modulations(torch.tensor(known, dtype=torch.float32, device=like.device))
        self.table = {
            t: ([v[:, i : i + 1] for v in vectors], None if head is None else head[i : i + 1])
            for i, t in enumerate(known)
        }

    def __call__(self, x: Tensor, t: float, branches: int = 1) -> tuple[Tensor, ...]:
        """Outputs (B, C, H, W) with the tokens and, for two branches, without."""
        rows, groups = self.rows[0], self.groups
        if branches == 2:
            rows, groups = torch.cat(self.rows), (*self.groups, *self.empty)
        return self.decoder.run(x, rows, groups, *self.table[t])[0].split(self.batch)


class Ladder(Condition):
    """The same tokens at several lengths, as one batch: all rows of the first length, then of the second, and so on.

    Every length is a group of its own, so nothing is padded; embedding, modulations and noise are shared, and so is the
    unguided branch of the first evaluation, where all lengths still have the same latents.

    Args:
        decoder: The network.
        codes: (B, N, code_dim), N <= K.
        counts: Lengths, each at most N.
        times: As for `Condition`.
        patches: Patches of the latents, P.
    """

    def __init__(
        self, decoder: VelocityDecoder, codes: Tensor, counts: Sequence[int], times: Sequence[float], patches: int
    ) -> None:
        registers, size = decoder.registers(codes), len(codes)
        lengths = [torch.full((size,), k, device=codes.device) for k in counts]
        masked = [decoder.masked(registers, k) for k in lengths]
        self._prepare(decoder, list(zip(masked, counts)), times, patches)
        self.single, self.first = size, True

    def __call__(self, x: Tensor, t: float, branches: int = 1) -> tuple[Tensor, ...]:
        """See `Condition`."""
        if not self.first or branches == 1:
            return super().__call__(x, t, branches)
        self.first = False
        (given,) = super().__call__(x, t, 1)
        one = (Group(self.single, 1, self.empty[0].mask),)
        null, _ = self.decoder.run(x[: self.single], self.rows[1][: self.single], one, *self.table[t])
        return given, null.repeat(self.batch // self.single, 1, 1, 1)


def _counted(length: int, times: int, like: Tensor) -> Tensor | None:
    """Additive mask (1, 1, 1, length) that lets the last key count `times` times; None for once."""
    if times == 1:
        return None
    mask = torch.zeros(length, dtype=like.dtype, device=like.device)
    mask[-1] = math.log(times)
    return mask[None, None, None]
