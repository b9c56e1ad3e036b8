"""The training loop of the LoRA healer: distillation, schedule, state on disk."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.core.errors import InputError
from lamina.core.files import atomic, fingerprint
from lamina.healers._lora_adapters import adapted, adapter_of, merge
from lamina.lab.lab import Lab, real
from lamina.lab.load import module_fingerprint

if TYPE_CHECKING:
    from lamina.healers.lora import History, Lora, Watcher

STATE = "heal.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
Row = Mapping[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """Steps, or minutes of training."""

    steps: int | None
    minutes: float | None

    def share(self, step: float, seconds: float) -> float:
        """Which share of the budget is spent before `step` (from 0)."""
        return step / self.steps if self.steps is not None else seconds / (60 * (self.minutes or 0))

    def expected(self, step: int, seconds: float) -> int:
        """How many steps it will be in all, after `step` of them."""
        return self.steps if self.steps is not None else max(step, round(step / max(self.share(step, seconds), 1e-9)))


@dataclass
class State:
    """Where the training stands; the tensors are those of the adapters and of the optimizer."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list[float])


def train(
    lora: Lora,
    lab: Lab,
    teacher: nn.Module | None,
    budget: Budget,
    *,
    state_dir: Path | None,
    every: int,
    watch: Watcher | None,
) -> History:
    """Train, merge, and say what was done; see `Lora.heal`."""
    from lamina.healers.lora import History

    rows = split(lab)
    file = None if state_dir is None else Path(state_dir) / STATE
    mark = "" if file is None else _mark(lora, lab, rows, budget)
    if teacher is not None:
        teacher.eval()
    lab.model.eval()
    with adapted(lab.anatomy, rank=lora.rank, alpha=lora.alpha, seed=lora.seed) as layers:
        named = {f"{path}.{k}": p for path, m in layers.items() for k, p in zip("ab", adapter_of(m), strict=True)}
        optimizer = torch.optim.AdamW(named.values(), lr=lora.lr, weight_decay=lora.weight_decay, foreach=False)
        kept = Kept(file, mark, named, optimizer)
        state = kept.read()
        began = state.step
        _Run(lora, lab, teacher, budget, rows, kept, state).go(every, watch)
        merge(layers)
        trained = sum(p.numel() for p in named.values())
    return History(tuple(state.losses), state.tokens, state.seconds, trained, len(layers), began)


@dataclass
class _Run:
    """One sitting of training: from the state to the end of the budget."""

    lora: Lora
    lab: Lab
    teacher: nn.Module | None
    budget: Budget
    rows: Sequence[Row]
    kept: Kept
    state: State

    def go(self, every: int, watch: Watcher | None) -> None:
        """Step until the budget is spent; keep the state after every `every` steps and at the end."""
        state, started, before = self.state, time.monotonic(), self.state.seconds
        while self.budget.share(state.step, state.seconds) < 1:
            self._step()
            state.seconds = before + time.monotonic() - started
            done = self.budget.share(state.step, state.seconds) >= 1
            if done or state.step % every == 0:
                self.kept.write(state)
            total = state.step if done else self.budget.expected(state.step, state.seconds)
            self.lab.progress("heal", state.step, total)
            if watch is not None:
                watch(state.step, total, state.losses[-1])

    def _step(self) -> None:
        state, lora, optimizer = self.state, self.lora, self.kept.optimizer
        rate = lora.lr * schedule(self.budget.share(state.step + 0.5, state.seconds), lora.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = collate([self.rows[i] for i in picks(len(self.rows), lora.batch, state.step, lora.seed)])
        loss = objective(lora, self.lab, self.teacher, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(f"the loss is no number at step {state.step + 1}", where="lora", hint="lower lr")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.kept.named.values(), lora.clip)
        optimizer.step()
        state.step += 1
        state.tokens += int(real(batch).sum())
        state.losses.append(value)


def objective(lora: Lora, lab: Lab, teacher: nn.Module | None, batch: Row) -> Tensor:
    """temperature² · KL(dense‖thinned) per token + cross_entropy · next-token loss; padding does not count."""
    batch = {k: v.to(lab.device) for k, v in batch.items()}
    logits = lab.forward(batch)
    mask = real(batch).to(logits.device)
    loss = logits.new_zeros((), dtype=torch.float32)
    if teacher is not None:
        extra = {"use_cache": False} if hasattr(getattr(teacher, "config", None), "use_cache") else {}
        with torch.no_grad():
            out = teacher(**batch, **extra)
        dense = getattr(out, "logits", out)
        loss = distance(dense[mask], logits[mask], lora.temperature)
    weight = lora.cross_entropy if teacher is not None else 1.0
    if weight:
        valid = mask[:, 1:] & mask[:, :-1]
        labels = batch["input_ids"][:, 1:][valid]
        loss = loss + weight * F.cross_entropy(logits[:, :-1][valid].float(), labels)
    return loss


def distance(dense: Tensor, thinned: Tensor, temperature: float) -> Tensor:
    """Mean over tokens of temperature² · KL(dense‖thinned), both [tokens, vocabulary] logits, softened."""
    p = torch.log_softmax(dense.float() / temperature, -1)
    q = torch.log_softmax(thinned.float() / temperature, -1)
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="sum") / len(q)


def schedule(share: float, warmup: float) -> float:
    """The factor of the learning rate: linear over the first `warmup` of the budget, then a cosine to 0."""
    if share < warmup:
        return share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def split(lab: Lab) -> list[Row]:
    """The lab's sequences one by one, each [1, tokens], padding cut off."""
    rows = []
    for batch in lab.batches:
        mask = real(batch)
        ids = batch["input_ids"]
        rows += [{"input_ids": i[m.to(ids.device)].unsqueeze(0)} for i, m in zip(ids, mask, strict=True)]
    return rows


def collate(rows: Sequence[Row]) -> Row:
    """Sequences as one batch; where their lengths differ, padded on the right, with a mask."""
    ids = [r["input_ids"][0] for r in rows]
    if len({len(i) for i in ids}) == 1:
        return {"input_ids": torch.stack(ids)}
    mask = [torch.ones_like(i) for i in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return {"input_ids": pad(ids, batch_first=True), "attention_mask": pad(mask, batch_first=True)}


def picks(count: int, batch: int, step: int, seed: int) -> list[int]:
    """The sequences of one step: epochs of all, each in an order that is a function of seed and epoch alone."""
    places = range(step * batch, (step + 1) * batch)
    epochs = {p // count for p in places}
    order = {e: np.random.default_rng([seed, e]).permutation(count) for e in epochs}
    return [int(order[p // count][p % count]) for p in places]


def _mark(lora: Lora, lab: Lab, rows: Sequence[Row], budget: Budget) -> str:
    """What the state belongs to: options, budget, text and weights."""
    text = fingerprint(*(r["input_ids"].cpu().numpy().tobytes() for r in rows))
    return fingerprint(dict(lora.options()), asdict(budget), text, module_fingerprint(lab.model))


@dataclass(frozen=True)
class Kept:
    """Adapters, optimizer and state in one safetensors file, replaced whole; nowhere where `file` is None."""

    file: Path | None
    mark: str
    named: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    def write(self, state: State) -> None:
        """Keep the state as it is now."""
        if self.file is None:
            return
        tensors = {}
        for name, parameter in self.named.items():
            tensors[f"{name}/value"] = parameter.detach()
            for moment in MOMENTS:
                tensors[f"{name}/{moment}"] = self.optimizer.state[parameter][moment]
        with atomic(self.file) as draft:
            save_file(tensors, draft, metadata={"mark": self.mark, "state": json.dumps(asdict(state))})

    def read(self) -> State:
        """Put the kept state back; a fresh one where there is no file."""
        if self.file is None or not self.file.is_file():
            return State()
        again = "delete it to start the healing anew"
        try:
            with safe_open(self.file, "pt") as kept:
                facts = kept.metadata() or {}
                if facts.get("mark") != self.mark:
                    what = "this state belongs to another model, text, budget or options"
                    raise InputError(what, where=self.file, hint=again)
                state = State(**json.loads(facts["state"]))
                for name, parameter in self.named.items():
                    parameter.data.copy_(kept.get_tensor(f"{name}/value"))
                    moments = {k: kept.get_tensor(f"{name}/{k}").to(parameter.device) for k in MOMENTS}
                    self.optimizer.state[parameter] = {"step": torch.tensor(float(state.step)), **moments}
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"a damaged state of healing: {error}", where=self.file, hint=again) from error
        return state
