"""Mistakes that were made, or could be, as edits of the source; the tests named with each must fail on it."""

from __future__ import annotations

from dataclasses import dataclass

CONFORMANCE = "tests/test_conformance.py::test_conformance[{}]"


@dataclass(frozen=True)
class Edit:
    """One replacement in one file of the package; `old` stands there exactly once."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A mistake and the tests that must catch it, each of them."""

    name: str
    edits: tuple[Edit, ...]
    caught_by: tuple[str, ...]


def mutant(name: str, file: str, old: str, new: str, *caught_by: str) -> Mutant:
    """A mutant of one edit; a test without a path is a case of the conformance suite."""
    return Mutant(name, (Edit(file, old, new),), tuple(_full(t) for t in caught_by))


def _full(test: str) -> str:
    return test if "::" in test else CONFORMANCE.format(test)


MUTANTS = (
    mutant(
        "the sign of a score flipped",
        "papers/depth/llm_drop.py",
        "lambda taps: 1 - taps.cosine",
        "lambda taps: taps.cosine - 1",
        "measure-cosine-identity_block_is_lowest",
        "measure-cosine-silent_sublayer_is_lowest",
    ),
    mutant(
        "a hook leaked",
        "anatomy/watch.py",
        "            for handle in handles:\n                handle.remove()",
        "            for handle in handles[1:]:\n                handle.remove()",
        "measure-cosine-measure_leaves_the_model_untouched",
        "tests/lab/test_lab.py::test_a_failing_tally_leaves_the_model_as_it_was",
    ),
    mutant(
        "layer_idx not renumbered",
        "rewrites/structure.py",
        '    _renumber(layers, strides, step.get("first", ()))\n',
        "",
        "rewrite-drop-cached_decoding_is_the_full_forward",
        "tests/rewrites/test_structure.py::test_cache_numbers_count_what_remains[llama]",
    ),
    mutant(
        "a stale list in the config",
        "anatomy/config.py",
        "found[key] = [list(value), [value[i] for i in kept]]",
        "found[key] = [list(value), list(value)]",
        "tests/anatomy/test_config.py::test_lists_of_layers_are_filtered",
        "tests/rewrites/test_structure.py::test_layer_types_stay_with_their_attentions",
    ),
    mutant(
        "a stale count of layers in the config",
        "rewrites/structure.py",
        'edit(_owned(model.config, step), step["config"], after=True)',
        'edit(_owned(model.config, step), step["config"], after=False)',
        "tests/rewrites/test_structure.py::test_cache_numbers_count_what_remains[llama]",
    ),
    mutant(
        "an attention gone still has its cache entry",
        "rewrites/structure.py",
        "    if all(counted):\n",
        "    if True:\n",
        "rewrite-drop-cached_decoding_is_the_full_forward",
    ),
    mutant(
        "the mean of batch means",
        "lab/tally.py",
        "Mean()).add(sums.cpu().numpy(), counts.cpu().numpy())",
        "Mean()).add((sums.sum() / counts.sum()).reshape(1).numpy(), np.ones(1))",
        "measure-cosine-batching_does_not_count",
    ),
    mutant(
        "the mean of sequence means",
        "lab/tally.py",
        "Mean()).add(sums.cpu().numpy(), counts.cpu().numpy())",
        "Mean()).add((sums / counts).numpy(), np.ones(len(sums)))",
        "tests/mutants/test_literal.py::test_token_means_are_literal",
    ),
    mutant(
        "KL with its arguments exchanged",
        "maths/divergence.py",
        "return (p.exp() * (p - q)).sum(-1).clamp_min(0.0)",
        "return (q.exp() * (q - p)).sum(-1).clamp_min(0.0)",
        "tests/maths/test_divergence.py::test_the_order_of_arguments",
    ),
    mutant(
        "the judge's KL taken over the thinned model's own distribution",
        "maths/divergence.py",
        "torch.linalg.vecdot(p[start : start + ROWS], z)",
        "torch.linalg.vecdot(z.softmax(-1), z)",
        "tests/lab/test_judge.py::test_the_judge_foresees_the_dropped_model[llama]",
    ),
    mutant(
        "padding not stripped from taps",
        "lab/rows.py",
        "        self.mask = real(batch, side)\n",
        '        self.mask = torch.ones_like(batch["input_ids"], dtype=torch.bool)\n',
        "measure-cosine-right_padding_does_not_count",
        "measure-cosine-left_padding_does_not_count",
        "tests/lab/test_taps.py::test_the_lab_hands_out_the_rows_own_tokens[llama-left]",
    ),
    mutant(
        "padding counts in the loss",
        "lab/objective.py",
        "return nll(logits[:, :-1], ids[:, 1:]).double() * valid, valid",
        "return nll(logits[:, :-1], ids[:, 1:]).double(), valid",
        "tests/lab/test_lab.py::test_losses_are_literal[6-right]",
    ),
    mutant(
        "prefix reuse starts one block late",
        "lab/judge.py",
        "        for number in range(start, len(blocks)):\n            block = blocks[number]",
        "        for number in range(start + 1, len(blocks)):\n            block = blocks[number]",
        "tests/lab/test_judge.py::test_any_set_from_any_base",
        "tests/lab/test_judge.py::test_the_judge_foresees_the_dropped_model[llama]",
    ),
    mutant(
        "recorded branches reused although what they read has changed",
        "lab/judge.py",
        "or any((r in gone) != (r in self.base) for r in reads)",
        "or False",
        "tests/lab/test_judge.py::test_any_set_from_any_base",
        "tests/lab/test_judge.py::test_counters_are_exact",
    ),
    mutant(
        "stopping early at a wrong bound",
        "lab/judge.py",
        "total > limit):",
        "total > limit / 8):",
        "tests/lab/test_judge.py::test_the_hint_orders_the_work_and_not_the_result[worst first]",
    ),
    mutant(
        "a loss given up early, although its terms may be negative",
        "lab/judge.py",
        '(self.metric != "loss" and total > limit)',
        "total > limit",
        "tests/lab/test_judge.py::test_a_loss_is_never_given_up",
    ),
    mutant(
        "the norm of a dropped sublayer left in",
        "rewrites/structure.py",
        "            block.set_submodule(path, gone.train(block.training))\n",
        "            pass\n",
        "rewrite-drop-forecast_is_the_fact",
        "tests/rewrites/test_structure.py::test_a_dropped_sublayer_costs_nothing",
    ),
    mutant(
        "a norm that two branches share goes with one",
        "anatomy/branches.py",
        "if any(n in mine for n in nodes) and c.path not in foreign}",
        "if any(n in mine for n in nodes)}",
        "tests/anatomy/test_discovery.py::test_every_architecture[phi]",
        "tests/anatomy/test_trial.py::test_ablated_equals_silent_by_weights[cohere]",
    ),
    Mutant(
        "tied weights counted twice",
        (
            Edit("anatomy/costs.py", "unique = {id(p): p for p in parameters}.values()", "unique = list(parameters)"),
            Edit(
                "anatomy/costs.py",
                "whole = weigh(model.parameters())",
                "whole = weigh(p for _, p in model.named_parameters(remove_duplicate=False))",
            ),
        ),
        (
            "tests/anatomy/test_costs.py::test_tied_weights_count_once[gpt2]",
            "tests/anatomy/test_costs.py::test_parameters_and_bytes_are_the_state_dict_s[gpt2]",
        ),
    ),
    mutant(
        "errors over tokens, as if they were independent",
        "lab/tally.py",
        "sums, counts = taps.per_sequence(self.score(taps))",
        "sums = self.score(taps)\n            counts = sums * 0 + 1",
        "measure-cosine-errors_are_over_sequences",
    ),
    mutant(
        "a trial that an error leaves in place",
        "anatomy/trial.py",
        "    try:\n        yield\n    finally:\n        if before is None:\n            del module.forward\n"
        "        else:\n            module.forward = before\n",
        "    yield\n    if before is None:\n        del module.forward\n    else:\n        module.forward = before\n",
        "tests/anatomy/test_trial.py::test_all_is_undone[True-llama]",
        "tests/anatomy/test_trial.py::test_an_error_inside_a_branch_undoes_all",
    ),
    mutant(
        "the scale of a branch forgotten",
        "anatomy/watch.py",
        "    if branch.scale != 1.0:\n        return found * branch.scale\n",
        "",
        "tests/anatomy/test_discovery.py::test_certificate[granite]",
        "tests/lab/test_taps.py::test_sublayers_chain_up_to_the_block[granite]",
    ),
    mutant(
        "a certificate that certifies anything",
        "anatomy/anatomy.py",
        "TOLERANCE = 1e-5",
        "TOLERANCE = 1e-1",
        "tests/anatomy/test_refusals.py::test_a_branch_that_changes_behind_the_anatomy_fails_the_certificate[llama]",
    ),
    mutant(
        "the zeros of a dropped branch taken for a constant that the block adds",
        "anatomy/joins.py",
        "    if node.op in ZEROS:\n        return True\n",
        "",
        "tests/papers/test_llm_drop.py::test_scores_under_trial_ablation_are_those_of_the_thinned_network[llama]",
    ),
    mutant(
        "a plan that overshoots its budget",
        "planners/lowest.py",
        "while not target.met(gone):",
        "while not target.met(gone[:-1]):",
        "planner-lowest-budget_is_met_and_not_overshot",
    ),
    mutant(
        "a plan that stops short of its budget",
        "planners/_target.py",
        "return self.amount(gone) >= self.need",
        "return self.amount(gone) >= 0.9 * self.need",
        "planner-lowest-budget_is_met_and_not_overshot",
    ),
    mutant(
        "protected sites chosen",
        "planners/_target.py",
        "        if sublayers & self.protected:\n            return False\n",
        "",
        "planner-lowest-protected_sites_stay",
    ),
    mutant(
        "the last attention chosen",
        "planners/_target.py",
        "        if self._last_caches and self._last_caches <= sublayers:\n            return False\n",
        "",
        "planner-lowest-something_is_left",
    ),
    mutant(
        "unknown keys taken in silence",
        "core/documents.py",
        '{"extra": "forbid"}',
        '{"extra": "ignore"}',
        "tests/core/test_documents.py::test_an_unknown_key_deep_in_a_plan_is_refused",
    ),
    mutant(
        "unknown options taken in silence",
        "core/registry.py",
        "            if key not in known:\n",
        "            if False:\n",
        "measure-cosine-unknown_option_is_refused",
    ),
    mutant(
        "files written in place",
        "core/files.py",
        '    with atomic(path) as draft:\n        draft.write_text(text, encoding="utf-8")',
        '    path.write_text("")\n    path.write_text(text, encoding="utf-8")',
        "tests/core/test_files.py::test_a_full_disk_is_one_clear_line[nothing-where0-file]",
    ),
    mutant(
        "an old folder lost where the new one can't take its place",
        "core/files.py",
        '        if (holder / "previous").exists() and not path.exists():\n'
        '            os.rename(holder / "previous", path)\n',
        "",
        "tests/core/test_files.py::test_a_full_disk_is_one_clear_line[something-where1-folder]",
    ),
)
