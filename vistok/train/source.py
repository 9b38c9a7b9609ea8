"""The data of a recipe: opened, and checked against what is to read it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from vistok.config import ConfigError, create, schema
from vistok.data.base import Dataset, TokenDataset, gives_text


def open_data(spec: Mapping[str, Any], section: str) -> Any:
    """The data set of a recipe's section.

    Raises:
        ConfigError: It cannot be opened; names the key.
    """
    try:
        return create("dataset", **spec)
    except ConfigError:
        raise
    except FileNotFoundError as err:
        raise ConfigError(f"{section}.path: {err}") from err
    except (OSError, ValueError) as err:
        raise ConfigError(f"{section}: {err}") from err


def warn_of_missing_captions(model: Any, spec: Mapping[str, Any], dataset: Dataset | TokenDataset) -> None:
    """Say so if a model that reads captions gets none."""
    if "text" in getattr(model, "options", ()) and not gives_text(dataset):
        taken = {key: kind for key, (kind, _) in schema(type(dataset)).items() if key.startswith("caption")}
        ways = [f"data.{key}={'true' if kind is bool else 'COLUMN'}" for key, kind in taken.items()]
        advice = f" Set {' or '.join(ways)} if there are any." if ways else ""
        warnings.warn(
            f"{model.registry_name} reads captions and the data set {spec['name']!r} gives none: it learns without."
            f"{advice}",
            stacklevel=3,
        )


def refuse_other_data(who: str, reads: str, spec: Mapping[str, Any], dataset: Dataset | TokenDataset) -> None:
    """Refuse tokens for what reads pictures, and the other way round.

    Raises:
        ConfigError: It does not fit; `who` begins the message.
    """
    given = "tokens" if isinstance(dataset, TokenDataset) else "pictures"
    if given != reads:
        wanted = "name: ids and the folder of vistok tokenize" if reads == "tokens" else "e.g. name: folder"
        raise ConfigError(f"{who} reads {reads}, and {spec['name']!r} gives {given}: give {wanted}.")
