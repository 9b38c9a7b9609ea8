"""Which tokens of a picture a compression method keeps, painted over it: in a real model, or from features alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from vistok.compress.budget import HostShape
from vistok.compress.method import FeatureMethod
from vistok.compress.signals import Signals
from vistok.config import create
from vistok.image import Preprocess, pil_to_tensor, to_pictures, to_pil
from vistok.plugins.families.base import family_of
from vistok.plugins.paint import paint
from vistok.registry import list_names, registry

if TYPE_CHECKING:
    from PIL.Image import Image

QUESTION = "What is in the picture?"
SHOWN = 448
"""Pixels of a painted picture's shorter side, at least."""
ANSWER = 16
"""Most tokens of an answer."""
GET_ONE = "python recipes/vlm/make_host.py runs/llava && vistok demo --vlm runs/llava"
"""The line that gives a small real model to look into."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A painted picture.

    Attributes:
        picture: Dropped tokens dark, merged ones tinted alike.
        original: The same picture unpainted.
        left: Tokens after the method's last cut.
        of: Tokens without it.
        share: Share of the prefill's FLOPs that is left in the language model's image tokens; None where there is none.
        answer: What the model says to the question with the method on; empty without a language model.
        plain: What it says with all tokens.
    """

    picture: Image
    original: Image
    left: int
    of: int
    share: float | None = None
    answer: str = ""
    plain: str = ""


class Keeper(Protocol):
    """Something that paints."""

    methods: list[str]
    about: str
    asks: bool

    def paint(self, picture: Any, method: str, keep: float, question: str = "") -> Kept:
        """Paint a picture under a method at a share of tokens kept."""


class FeatureKeeper:
    """Methods that need features alone, on features that come with vistok: those of AlexNet, the network of LPIPS.

    No language model is at work; it shows how a method chooses, not what a model would answer.

    Attributes:
        methods: Names that can be chosen.
        about: What is shown, for the page.
        asks: Whether a question matters.
    """

    asks = False
    SIZE, GRID = 400, (24, 24)

    def __init__(self) -> None:
        from vistok.losses.perceptual import Lpips

        self.network = Lpips(net="alex").eval()
        self.preprocess = Preprocess(size=(self.SIZE, self.SIZE))
        self.methods = [name for name in plain_names() if self._works(name)]
        self.about = (
            f"Shown on features of AlexNet, which comes with vistok for LPIPS: {self.GRID[0]} x {self.GRID[1]} = "
            f"{self.GRID[0] * self.GRID[1]} tokens, as many as LLaVA-1.5 has. Only methods that need nothing but "
            f"features work on them. For a real model and all methods: {GET_ONE}"
        )

    @torch.no_grad()
    def paint(self, picture: Any, method: str, keep: float, question: str = "") -> Kept:
        """See `Keeper.paint`.

        Raises:
            PictureError: No picture, damaged, or too large.
            ValueError: A method or share that means nothing here.
        """
        cropped = self.preprocess.resize(to_pil(picture))
        features = list(self.network.features(pil_to_tensor(cropped)[None]))[-1]  # (1, 256, 24, 24)
        labels, left = self._reduce(method, keep, features[0].flatten(1).T, self.GRID)
        sizes = torch.bincount(labels[labels >= 0], minlength=len(labels))[labels.clamp_min(0)]
        shown = enlarged(cropped)
        painted = paint(shown, labels.view(self.GRID), torch.where(labels < 0, 0, sizes).view(self.GRID))
        return Kept(picture=painted, original=shown, left=left, of=len(labels))

    @staticmethod
    def _reduce(name: str, keep: float, features: Tensor, grid: tuple[int, int]) -> tuple[Tensor, int]:
        """Token that every cell went to, -1 where it was dropped, (N,), and how many tokens are left."""
        method: FeatureMethod = create("method", name, keep=float(keep))
        count = method.promise(method.count(len(features)), grid, len(features))
        if count == len(features):
            return torch.arange(count), count
        reduction = method.compress(Signals(features=features, grid=grid), count)
        return reduction.labels()[0], reduction.index.shape[1]

    def _works(self, name: str) -> bool:
        """Whether a method shortens features when it is given nothing else."""
        _, builder, _ = registry("method").resolve(name)
        if not (isinstance(builder, type) and issubclass(builder, FeatureMethod)):
            return False
        if builder.trained or not builder.needs <= {"grid"}:
            return False
        if "image" not in create("method", name, keep=0.25).modalities:
            return False
        features = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
        return self._reduce(name, 0.25, features, (8, 8))[1] < 64


class HostKeeper:
    """Methods in a real vision-language model from a local directory, with its answer to a question.

    Args:
        source: Directory of a model of transformers with its processor.

    Raises:
        FileNotFoundError: There is no model in it.
        TypeError: No family fits the model.
        ModuleNotFoundError: transformers is not installed.

    Attributes:
        methods: Names of all that this model takes.
        about: What is shown, for the page.
        asks: Whether a question matters.
    """

    asks = True

    def __init__(self, source: str | Path) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise ModuleNotFoundError("A model of one's own needs transformers: pip install 'vistok[demo]'.")
        from vistok.evaluate.vlm import load_host

        self.model = load_host(source, "float32")
        from transformers import AutoProcessor

        self.processor = AutoProcessor.from_pretrained(source)
        family_of(self.model)
        self.methods = [name for name in plain_names() if self._takes(name)]
        self.about = f"{type(self.model).__name__} from {source}."
        self._plain: tuple[Any, str] = (None, "")

    @torch.inference_mode()
    def paint(self, picture: Any, method: str, keep: float, question: str = QUESTION) -> Kept:
        """See `Keeper.paint`.

        Raises:
            PictureError: No picture, damaged, or too large.
            ValueError: A share that means nothing here, or tokens that lie on no grid that can be painted.
        """
        from vistok.plugins.attach import attach

        found = to_pil(picture)
        question = question.strip() or QUESTION
        inputs = self._inputs(found, question)
        with attach(self.model, method, keep=float(keep)) as plugin:
            answer = self._answer(inputs)
            report = plugin.report()
            shown = enlarged(self._seen(found, inputs))
            painted = plugin.show(shown)
        return Kept(
            picture=painted,
            original=shown,
            left=report.trace.image[-1][0],
            of=sum(report.trace.images[0]),
            share=self._share(report, plugin.runtime.host),
            answer=answer,
            plain=self._plain_answer(inputs, (found.tobytes(), question)),
        )

    def _takes(self, name: str) -> bool:
        """Whether a method can be attached, cuts before decoding, and has no weights of its own to load."""
        from vistok.plugins.attach import attach

        _, builder, _ = registry("method").resolve(name)
        if getattr(builder, "trained", False) or getattr(builder, "stages", None) == {"decode"}:
            return False
        try:
            with attach(self.model, name, keep=0.5) as plugin:
                return "image" in getattr(plugin.method, "modalities", {"image"})
        except (TypeError, ValueError):
            return False

    def _inputs(self, picture: Image, question: str) -> dict[str, Any]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        if getattr(self.processor, "chat_template", None):
            prompt = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        else:
            prompt = f"USER: {self.processor.image_token}\n{question} ASSISTANT:"
        return dict(self.processor(text=[prompt], images=[picture], return_tensors="pt").to(self.model.device))

    def _answer(self, inputs: Mapping[str, Any]) -> str:
        out = self.model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
        said = out[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(said, skip_special_tokens=True)).strip()

    def _plain_answer(self, inputs: Mapping[str, Any], key: Any) -> str:
        if self._plain[0] != key:
            self._plain = (key, self._answer(inputs))
        return self._plain[1]

    def _seen(self, picture: Image, inputs: Mapping[str, Any]) -> Image:
        """The picture as the processor cropped it, where it gives one picture; else the whole picture."""
        pixels, images = inputs.get("pixel_values"), getattr(self.processor, "image_processor", None)
        mean, std = (getattr(images, name, None) for name in ("image_mean", "image_std"))
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or len(pixels) != 1 or mean is None or std is None:
            return picture
        shape = (1, -1, 1, 1)
        shown = pixels.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
        return to_pictures(shown.clamp(0, 1))[0]

    @staticmethod
    def _share(report: Any, host: HostShape) -> float:
        return float(report.trace.budget(host)["flops"][0])


def plain_names() -> list[str]:
    """Registered methods without their presets, whose budget the page sets itself."""
    presets = registry("method").presets
    return [name for name in list_names("method") if name not in presets]


def enlarged(picture: Image) -> Image:
    """The picture with a shorter side of at least `SHOWN` pixels, so that painted cells have sharp edges."""
    from PIL import Image

    factor = SHOWN / min(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    return picture if factor <= 1 else picture.resize(size, Image.Resampling.BICUBIC)
