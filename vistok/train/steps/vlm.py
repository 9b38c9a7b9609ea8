"""Visual instruction tuning: a vision-language model learns answers about pictures, with any plug-in at work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from vistok.config import Of, Spec
from vistok.data.base import Batch
from vistok.registry import register
from vistok.train.steps.base import Losses, Part, Step

IGNORED = -100
"""Label of a token that is not learnt, as transformers has it."""
Turn = tuple[str, str]


@register("step", "vlm")
class Vlm(Step):
    """Cross-entropy on the answers of a conversation about each picture (LLaVA, arXiv 2304.08485, section 4.2).

    The model is of kind `host`: frozen but for projector and LoRA. A sample's text is its conversation, one
    `question<tab>answer` a line. With a method the plug-in works in training as it will at test time; methods that cut
    inside the language model hand the last hidden states back at full length, so labels line up.

    Args:
        method: Compression method that is active while training, `{name: fastv, keep: 0.5}`; null for none.
        turns: Most questions of a picture in one conversation, the first ones; null for all.
    """

    model_kind: ClassVar[str] = "host"
    own_losses: ClassVar[tuple[str, ...]] = ("answers",)

    def __init__(self, *, method: Annotated[Spec | None, Of("method")] = None, turns: int | None = None) -> None:
        self.method, self.turns = method, turns

    def setup(self, model: nn.Module, losses: Losses) -> None:
        """Take a host, and put the method on it.

        Raises:
            ValueError: The recipe has losses on pictures, which nothing here makes.
        """
        self.begin(model, losses)
        self.processor: Any = model.processor
        self.plugin = None
        if self.method is not None:
            from vistok.plugins.attach import attach

            self.plugin = attach(model.model, self.method)  # type: ignore[arg-type]

    def begin(self, model: nn.Module, losses: Losses) -> None:
        """Take what is trained.

        Raises:
            ValueError: The recipe has losses on pictures, which nothing here makes.
        """
        super().setup(model, losses)
        if losses.losses:
            name = next(iter(losses.losses))
            raise ValueError(f"Step {self.registry_name!r} makes no pictures. Remove losses.{name}.")

    def run(self, batch: Batch, step: int, generator: torch.Generator) -> Iterator[Part]:
        """One part, `model`, with the share of answer tokens guessed right as `answers/accuracy`. See `Step.run`.

        Raises:
            ValueError: The data set gives no conversations.
        """
        inputs, labels = self.inputs(batch)
        tail = tail_of(labels)
        out = self._forward(inputs, labels, tail)
        losses: Losses = self.helpers["losses"]  # type: ignore[assignment]
        weight = losses.weight("answers", step)
        stats = {} if self.shortened else {"answers/accuracy": accuracy(out.logits, labels[:, -tail:])}
        yield Part("model", weight * out.loss, {"answers": out.loss}, stats, {"answers": weight})

    def inputs(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """What the host takes of a batch, and its labels, on the batch's device."""
        if batch.text is None:
            raise ValueError(f"Step {self.registry_name!r} needs conversations as text, e.g. data: {{name: scenes}}.")
        conversations = [parse(text)[: self.turns] for text in batch.text]
        inputs, labels = encode(self.processor, batch.images, conversations)
        device = batch.images.device
        return {k: v.to(device) for k, v in inputs.items()}, labels.to(device)

    @property
    def shortened(self) -> bool:
        """Whether the method takes placeholders out of the prompt, labels included."""
        return self.plugin is not None and self.plugin.method.shortens_prompt

    def _forward(self, inputs: dict[str, Tensor], labels: Tensor, tail: int) -> Any:
        model = self.trained["model"]
        if self.shortened:  # which columns are left is the packer's business: logits of all of them
            return model(**inputs, labels=labels, use_cache=False)
        return model(**inputs, labels=labels[:, -tail:], logits_to_keep=tail, use_cache=False)


def parse(text: str) -> list[Turn]:
    """Questions and answers of a sample's text.

    Raises:
        ValueError: A line that is not `question<tab>answer`, or none at all.
    """
    turns = [tuple(line.split("\t")) for line in text.splitlines() if line.strip()]
    if not turns or any(len(turn) != 2 for turn in turns):
        raise ValueError(f"Expected lines of question<tab>answer, got {text[:80]!r}.")
    return turns  # type: ignore[return-value]


def messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A conversation about one picture as chat templates take it; an empty last answer is left out."""
    found: list[dict[str, Any]] = []
    for i, (question, answer) in enumerate(turns):
        content: list[dict[str, str]] = [{"type": "image"}] if i == 0 else []
        found.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        if answer:
            found.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return found


def encode(processor: Any, images: Tensor, conversations: Sequence[Sequence[Turn]]) -> tuple[dict[str, Tensor], Tensor]:
    """What a host takes, and labels that are -100 everywhere but on the answers and the token that ends each.

    Args:
        processor: The host's processor, with a chat template.
        images: Float RGB in [0, 1], (B, 3, H, W), resized and normalised as the processor says.
        conversations: Questions and answers of every picture.

    Returns:
        Inputs, and labels (B, L).

    Raises:
        ValueError: A chat template that writes earlier turns differently once there are later ones.
    """
    chats = [messages(turns) for turns in conversations]
    texts = [processor.apply_chat_template(chat, tokenize=False) for chat in chats]
    inputs = processor(
        text=texts, images=list(images), images_kwargs={"do_rescale": False}, padding=True, return_tensors="pt"
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = torch.full_like(ids, IGNORED)
    for row, (chat, text) in enumerate(zip(chats, texts)):
        end = int(mask[row].nonzero()[-1]) + 1
        after = end - _length(processor, text)  # the picture's tokens come before every answer
        for i in range(1, len(chat), 2):
            asked = processor.apply_chat_template(chat[:i], tokenize=False, add_generation_prompt=True)
            answered = processor.apply_chat_template(chat[: i + 1], tokenize=False).rstrip("\n")
            if not (text.startswith(answered) and answered.startswith(asked)):
                raise ValueError("The chat template rewrites earlier turns. Train with train.step.turns=1.")
            start, stop = after + _length(processor, asked), after + _length(processor, answered)
            labels[row, start:stop] = ids[row, start:stop]
    return dict(inputs), labels


def _length(processor: Any, text: str) -> int:
    return len(processor.tokenizer(text, add_special_tokens=True)["input_ids"])


def tail_of(labels: Tensor) -> int:
    """Columns from the one in front of the first label of any row on; everything before is picture and question."""
    first = int((labels != IGNORED).any(0).nonzero()[0])
    return min(labels.shape[1] - first + 1, labels.shape[1])


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the labelled tokens that logits of the same columns (B, L, V) guess right."""
    asked = labels[:, 1:] != IGNORED
    return ((logits[:, :-1].argmax(-1) == labels[:, 1:]) & asked).sum() / asked.sum()
