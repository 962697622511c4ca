"""Likelihood of texts after images: all texts of an image share one row, as a token trie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from frozenprefix.errors import DataError
from frozenprefix.inference.captioner import Captioner
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.packing import PackedBatch, Target, pack
from frozenprefix.models.packing.division import TOKENS_PER_ROW, divide
from frozenprefix.models.processing import IMAGE_TOKEN

LOGIT_ROWS = 256  # places whose logits are in memory at once


@dataclass
class _Row:
    """A trie of targets (`packed`, one row), and where each step of each target is: three int64[steps]."""

    packed: PackedBatch
    targets: list[int]  # numbers within their group
    node: Tensor
    label: Tensor
    owner: Tensor  # index into `targets`

    @property
    def length(self) -> int:
        return self.packed.input_ids.shape[1]


def likeliest(
    captioner: Captioner,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    prefix_embeds: Tensor | None = None,
    *,
    end_token: bool = False,
) -> list[str]:
    """The likeliest of each prompt's choices, by the sum over its tokens; the first of equally likely ones.

    Args:
        prompts: texts with an `<image>` for every image. What precedes the choices is read once.
        choices: of each prompt.
        prefix_embeds: float[images, P, D_lm] of all prompts in order; without them the LM is asked blind.
        end_token: let the text end after the choice. Without it one that begins another always wins over it.

    Example:
        >>> likeliest(captioner, ["A photo of a"], [["dog", "cat"]])[0] in ("dog", "cat")
        True
    """
    groups = [[(prompt, texts)] for prompt, texts in zip(prompts, choices, strict=True)]
    return [text for (text,) in likeliest_of_groups(captioner, groups, prefix_embeds, end_token=end_token)]


def likeliest_of_groups(
    captioner: Captioner,
    groups: Sequence[Sequence[tuple[str, Sequence[str]]]],
    prefix_embeds: Tensor | None = None,
    *,
    end_token: bool = False,
) -> list[list[str]]:
    """As `likeliest`, for several prompts about the same images, which are read once for all of them.

    Args:
        groups: the prompts of each group of images, with their choices.
        prefix_embeds: float[images, P, D_lm] of all groups in order.

    Example:
        >>> likeliest_of_groups(captioner, [[("Is it", ["red"]), ("It is", ["blue"])]])
        [['red', 'blue']]
    """
    targets: list[list[Target]] = []
    counts: list[int] = []
    for group in groups:
        counts.append(0 if prefix_embeds is None else group[0][0].count(IMAGE_TOKEN))
        targets.append([])
        for prompt, texts in group:
            prompt = captioner.blind_prompt(prompt) if prefix_embeds is None else prompt
            context = captioner.processor.encode_prompt(prompt)
            ids = [captioner.processor.encode_target(prompt, text) for text in texts]
            targets[-1] += [Target([*context, *(each if end_token else each[:-1])], len(context)) for each in ids]
    scores = log_likelihoods(captioner.model, targets, prefix_embeds, images_per_group=counts)
    chosen: list[list[str]] = []
    for group, values in zip(groups, scores, strict=True):
        parts = values.split([len(texts) for _, texts in group])
        chosen.append([texts[int(part.argmax())] for (_, texts), part in zip(group, parts, strict=True)])
    return chosen


@torch.inference_mode()
def log_likelihoods(
    model: FrozenPrefixForConditionalGeneration,
    groups: Sequence[Sequence[Target]],
    prefix_embeds: Tensor | None = None,
    *,
    images_per_group: Sequence[int] | None = None,
    rows_at_once: int = 16,
) -> list[Tensor]:
    """Sum over a target's free tokens of log p(token | images and tokens before it).

    Targets that share images and first tokens are packed into one row, as a token trie, so that the shared part is
    computed once. An LM that cannot read tries (ALiBi, recurrent layers), or none of that length (sliding window),
    gets one target per row.

    Args:
        groups: the targets of each group of images that belong together. A list that occurs several times is packed
            once.
        prefix_embeds: float[images, P, D_lm] of all groups in order; None for targets without images.
        images_per_group: images of each group; by default 1 each, or 0 without `prefix_embeds`.

    Returns:
        for each group float32[targets].

    Raises:
        ConfigError: for a target that is longer than the learned positions of the LM.
        TrainingError: for a target without a free or without a context token, or with a wrong number of placeholders.

    Example:
        >>> dog, cat = Target([1, 5, 6], num_context=1), Target([1, 5, 7], num_context=1)
        >>> log_likelihoods(model, [[dog, cat]])[0].shape
        torch.Size([2])
    """
    values = [torch.zeros(len(group)) for group in groups]
    for number, row, steps in _scored_rows(model, groups, prefix_embeds, images_per_group, rows_at_once):
        values[number][row.targets] = torch.zeros(len(row.targets)).index_add_(0, row.owner, steps)
    return values


@torch.inference_mode()
def token_log_likelihoods(
    model: FrozenPrefixForConditionalGeneration,
    groups: Sequence[Sequence[Target]],
    prefix_embeds: Tensor | None = None,
    *,
    images_per_group: Sequence[int] | None = None,
    rows_at_once: int = 16,
) -> list[list[Tensor]]:
    """log p(token | images and tokens before it) of every free token; arguments and errors as of `log_likelihoods`.

    Returns:
        for each group, for each target float32[free tokens].

    Example:
        >>> dog = Target([1, 5, 6], num_context=1)
        >>> tokens = token_log_likelihoods(model, [[dog]])[0][0]
        >>> tokens.shape, torch.allclose(tokens.sum(), log_likelihoods(model, [[dog]])[0])
        (torch.Size([2]), True)
    """
    values = [[torch.empty(0)] * len(group) for group in groups]
    for number, row, steps in _scored_rows(model, groups, prefix_embeds, images_per_group, rows_at_once):
        counts = row.owner.bincount(minlength=len(row.targets)).tolist()
        for target, part in zip(row.targets, steps.split(counts), strict=True):
            values[number][target] = part
    return values


def _scored_rows(
    model: FrozenPrefixForConditionalGeneration,
    groups: Sequence[Sequence[Target]],
    prefix_embeds: Tensor | None,
    images_per_group: Sequence[int] | None,
    rows_at_once: int,
) -> Iterator[tuple[int, _Row, Tensor]]:
    """Number of the group, row, and log p float32[steps] of its steps, for every row of every group."""
    counts = list(images_per_group or [0 if prefix_embeds is None else 1] * len(groups))
    longest = max(len(target.input_ids) for group in groups for target in group)
    model.lm.check_length(longest - 1, what="choices: the longest prompt and choice")
    packable = model.lm.packing_problem(longest) is None
    known: dict[tuple[int, int], list[_Row]] = {}
    units: list[tuple[int, int, _Row]] = []  # group, its first image, row
    firsts = accumulate(counts, initial=0)
    for number, (group, count, first) in enumerate(zip(groups, counts, firsts, strict=False)):
        if (id(group), count) not in known:
            known[id(group), count] = _rows_of(model, group, count, TOKENS_PER_ROW if packable else 0)
        units += [(number, first, row) for row in known[id(group), count]]
    for start in range(0, len(units), rows_at_once):
        batch = units[start : start + rows_at_once]
        first = batch[0][1]
        last = batch[-1][1] + counts[batch[-1][0]]
        batch_embeds = None if prefix_embeds is None or last == first else prefix_embeds[first:last]
        scores = _score(model, [(row, image - first) for _, image, row in batch], batch_embeds)
        for (number, _, row), steps in zip(batch, scores, strict=True):
            yield number, row, steps


def _rows_of(
    model: FrozenPrefixForConditionalGeneration, group: Sequence[Target], count: int, budget: int
) -> list[_Row]:
    """A group's targets in rows of up to `budget` tokens, or one target each."""
    rows = []
    image_token_id = model.config.image_token_id
    if image_token_id is None:
        raise DataError("config.image_token_id: got None; the processor knows the id of <image>")
    for numbers in divide([target.input_ids for target in group], budget):
        targets = [group[number] for number in numbers]
        packed = pack(
            [targets],
            image_token_id=image_token_id,
            prefix_length=model.placeholders_per_image,
            images_per_group=[count],
        )
        rows.append(_Row(packed, numbers, *_steps(packed, targets)))
    return rows


def _steps(packed: PackedBatch, targets: Sequence[Target]) -> tuple[Tensor, Tensor, Tensor]:
    """Walk each target down its trie: node, next token and owner of every step that counts."""
    child: dict[tuple[int, int], int] = {}
    above: list[int] = []  # the nodes from the root to the last one
    tokens, depths = packed.input_ids[0].tolist(), packed.position_ids[0].tolist()
    for place, (token, depth) in enumerate(zip(tokens, depths, strict=True)):
        del above[depth:]
        child[above[-1] if above else -1, token] = place
        above.append(place)
    steps: list[tuple[int, int, int]] = []
    for owner, target in enumerate(targets):
        node = -1
        for place, token in enumerate(target.input_ids):
            if place >= target.num_context:
                steps.append((node, token, owner))
            node = child.get((node, token), -1)  # the last token of a target need not be read
    node_of, label, owner_of = torch.tensor(steps).unbind(dim=1)
    return node_of, label, owner_of


def _score(
    model: FrozenPrefixForConditionalGeneration,
    rows: Sequence[tuple[_Row, int]],
    prefix_embeds: Tensor | None,
) -> list[Tensor]:
    """log p float32[steps] of each row's steps, read together. Rows come with the number of their first image."""
    if model.lm.is_encoder_decoder:
        return _score_written(model, rows, prefix_embeds)
    packed = _stack(rows, model.placeholders_per_image).to(model.device)
    hidden = model.packed_hidden(packed, prefix_embeds)
    values = torch.empty(len(packed.edge_label), device=hidden.device)
    for start in range(0, len(hidden), LOGIT_ROWS):
        # [K', D_lm] -> [K', V]
        logits = model.lm.logits(hidden[start : start + LOGIT_ROWS], torch.float32)
        mine = (packed.edge_source >= start) & (packed.edge_source < start + LOGIT_ROWS)
        at = packed.edge_source[mine] - start
        values[mine] = logits[at, packed.edge_label[mine]] - logits.logsumexp(dim=-1)[at]
    return list(values.cpu().split([len(row.node) for row, _ in rows]))


def _score_written(
    model: FrozenPrefixForConditionalGeneration, rows: Sequence[tuple[_Row, int]], prefix_embeds: Tensor | None
) -> list[Tensor]:
    """As `_score` for an encoder-decoder LM, whose rows hold one target each: its encoder reads the context."""
    contexts = [row.packed.input_ids[0, : int(row.node[0]) + 1] for row, _ in rows]
    ids, mask, labels = (
        pad_sequence(list(parts), batch_first=True, padding_value=padding).to(model.device)
        for parts, padding in (
            (contexts, 0),
            ([torch.ones_like(context) for context in contexts], 0),
            ([row.label for row, _ in rows], -100),
        )
    )
    if prefix_embeds is not None:
        # each row gets its images, which rows of one group share
        counts = [int((row.packed.prefix_index >= 0).sum()) // model.placeholders_per_image for row, _ in rows]
        images = [image + i for (_, image), count in zip(rows, counts, strict=True) for i in range(count)]
        prefix_embeds = prefix_embeds[images]
    source, source_mask = model.lm.prompt(ids, mask)
    inputs_embeds, seen = model.fuse(source, prefix_embeds, source_mask)
    with model.fusion.seeing(seen):
        # [R, L, V]
        logits = model.lm(inputs_embeds, source_mask, labels).logits.float()
    steps = logits.log_softmax(dim=-1).gather(2, labels.clamp(min=0)[..., None])[..., 0].cpu()
    return [line[: len(row.label)] for line, (row, _) in zip(steps, rows, strict=True)]


def _stack(rows: Sequence[tuple[_Row, int]], per_image: int) -> PackedBatch:
    """One batch of rows, padded on the right, whose edges are the steps of all targets in order."""
    lengths = [row.length for row, _ in rows]
    width = max(lengths)
    shape = (len(rows), width)
    ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    ends = torch.arange(1, width + 1).repeat(len(rows), 1)  # padding sees itself
    prefix, latest = torch.full(shape, -1), torch.full(shape, -1)
    for r, (row, image) in enumerate(rows):
        packed, real = row.packed, slice(0, row.length)
        ids[r, real], positions[r, real], ends[r, real] = (
            part[0] for part in (packed.input_ids, packed.position_ids, packed.subtree_end)
        )
        for index, own in ((prefix, packed.prefix_index[0]), (latest, packed.latest_index[0])):
            index[r, real] = torch.where(own >= 0, own + image * per_image, -1)
    nodes = torch.cat([row.node + r * width for r, (row, _) in enumerate(rows)])
    predict_index, edge_source = nodes.unique(return_inverse=True)
    return replace(
        rows[0][0].packed,
        input_ids=ids,
        position_ids=positions,
        subtree_end=ends,
        prefix_index=prefix,
        latest_index=latest,
        predict_index=predict_index,
        edge_source=edge_source,
        edge_label=torch.cat([row.label for row, _ in rows]),
        edge_weight=torch.ones(len(nodes)),
        num_targets=sum(len(row.targets) for row, _ in rows),
        num_tokens=len(nodes),
        lengths=torch.tensor(lengths) if all(len(row.targets) == 1 for row, _ in rows) else None,
    )
