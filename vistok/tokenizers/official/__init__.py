"""Published checkpoints of tokenizers: which format a folder is in, and what its keys are called here."""

from __future__ import annotations

from vistok.hub import FORMATS as FORMATS
from vistok.hub import Converted as Converted
from vistok.hub import Format as Format
from vistok.hub import Rules as Rules
from vistok.hub import rename as rename
