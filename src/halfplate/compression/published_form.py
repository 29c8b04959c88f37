"""The tensors of a model under the names and in the shapes in which models of its kind are published."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from halfplate.compression.result import Entries, plain_entries, plain_tensors
from halfplate.models.experts.stored import joined_names, parts_of
from halfplate.models.sources import skeleton
from halfplate.models.streamed import StreamedModel


class PublishedForm:
    """The tensors of an uncompressed model in their stored type, made when they are asked for.

    Those of experts are what transformers saves: one by one or all in one, and under the names of the family (Mixtral: `w1`, `w2`, `w3`).

    entries: element type and shape of each tensor by its name, in the order in which `tensor` is cheapest.
    """

    def __init__(self, streamed: StreamedModel) -> None:
        self.streamed = streamed
        self._plain = plain_entries(streamed, streamed.stored)
        self._experts = joined_names(streamed.model)
        self._parts: dict[str, list[str]] = defaultdict(list)
        for name, (key, *_) in parts_of(streamed.model).items():
            self._parts[key].append(name)
        self._joined = skeleton(streamed.source, joined=True) if self._experts else None
        self._origin: dict[str, str] = {}
        self._current: tuple[str, dict[str, Tensor]] = ("", {})
        self.entries: Entries = self._plain if self._joined is None else self._all_entries()

    def _all_entries(self) -> Entries:
        """The entries of a model with experts; each name is also kept with that of the tensor in transformers that it comes from."""
        assert self._joined is not None
        found: Entries = {}
        for key, empty in self._joined.state_dict().items():
            if (first := self._first(key)) not in self._plain:
                continue  # tied to another one
            for name, tensor in self._saved(key, torch.empty_like(empty, device="meta")).items():
                found[name], self._origin[name] = (self._plain[first][0], tuple(tensor.shape)), key
        return found

    def _first(self, key: str) -> str:
        """One of the tensors that the tensor `key` of transformers consists of."""
        return self._parts[key][0] if key in self._experts else key

    def _saved(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """What transformers saves of a tensor of the model."""
        from transformers.core_model_loading import revert_weight_conversion

        assert self._joined is not None
        saved: dict[str, Tensor] = revert_weight_conversion(self._joined, {key: tensor})
        return saved

    def tensor(self, name: str) -> Tensor:
        """The tensor with this name; raises HalfplateError if it holds NaN or inf in its stored type."""
        if self._joined is None:
            return self._read(name)
        key = self._origin[name]
        if self._current[0] != key:
            self._current = "", {}  # frees the last before the next is made
            self._current = key, self._saved(key, self._whole(key))
        return self._current[1].pop(name).contiguous()

    def _whole(self, key: str) -> Tensor:
        """A tensor as transformers holds it: of experts, that of all of them."""
        if key not in self._experts:
            return self._read(key)
        module, joined, layout = self._experts[key]
        tensor = layout.tensor(joined)
        whole = torch.empty(tensor.shape, dtype=self._plain[self._first(key)][0], device="cpu")
        slots, by_expert = layout.slots(), tensor.by_expert(whole, layout.experts)
        for name in self._parts[key]:
            number, _, part = name.removeprefix(f"{module}.").partition(".")
            slots[part].of(by_expert[int(number)]).copy_(self._read(name))
        return whole

    def _read(self, name: str) -> Tensor:
        ((_, tensor),) = plain_tensors(self.streamed, {name: self._plain[name]})
        return tensor
