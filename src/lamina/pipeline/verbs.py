"""The seven verbs, as functions over a run folder; each can be killed and taken up again."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamina.core import registry
from lamina.core.documents import Evidence, EvidenceFile, Plan, Receipt, Receipts, plain
from lamina.core.errors import InputError
from lamina.core.files import fingerprint, sweep
from lamina.core.papers import Need, Status
from lamina.core.sites import SUBLAYERS, Kind
from lamina.lab.order import informed, merged
from lamina.pipeline import proving
from lamina.pipeline.checks import check, fitting, seeded
from lamina.pipeline.choosing import choose, options_of, price
from lamina.pipeline.exporting import export, summary
from lamina.pipeline.proving import ITEMS
from lamina.pipeline.run import Run
from lamina.pipeline.scoring import Desk, How
from lamina.pipeline.table import PARTS, SURVEY, write_parts, write_survey


def survey(run: Run, measures: Sequence[str] | None = None, how: How | None = None) -> None:
    """Score every block and sublayer: the recipe's measure and all that share its pass, or those named.

    Where the recipe's planner takes options from a menu, they are priced too (`menu.json`). A survey that is there
    already and holds the recipe's measure is kept, whatever else it holds. Measures that the run has been surveyed by
    before on the same text are kept and not run again.
    """
    how = how or How()
    names = list(measures) if measures is not None else _measures(run)
    outputs = [SURVEY, *([PARTS] if how.compare else [])]
    asked = {"compare": how.compare, "shards": how.shards if how.compare else 0}
    with run.verb(
        "survey", [*_surveyed(run, names), *([asked] if how.compare else [])], outputs, measures=names
    ) as work:
        if work:
            lab = run.lab()
            for site in run.recipe.budget.protect:
                lab.anatomy.site(site)
            run.say(f"surveying {len(lab.anatomy.sites)} sites by {', '.join(names)}")
            made = [registry.MEASURES.make(n, options_of(run, n)) for n in names]
            desk = Desk(run, lab, dict(zip(names, made, strict=True)), {n: options_of(run, n) for n in names}, how)
            found = desk.make()
            write_survey(
                run.path(SURVEY), found.scores, lab.anatomy,
                tokens=lab.tokens, seed=run.recipe.seed, fingerprint=run.loaded.fingerprint,
            )  # fmt: skip
            write_parts(run.path(PARTS), found.parts)
            run.log(f"survey: {lab.passes:.2f} forward-equivalents over {lab.tokens} tokens")
    if measures is None:
        price(run)


def _surveyed(run: Run, names: Sequence[str]) -> list[object]:
    """What a survey depends on."""
    options = {n: plain(options_of(run, n)) for n in names}
    return [run.loaded.fingerprint, run.tokens.fingerprint, list(names), options, run.recipe.dtype, run.recipe.seed]


def _measures(run: Run) -> list[str]:
    """What the recipe needs, and the stable measures of blocks and sublayers that share one forward; or the measures of
    the survey that is there.
    """
    wanted = registry.row(run.recipe.name).measure
    kept = [n for n in (run.noted("survey") or {}).get("measures", []) if n in registry.MEASURES]
    if (not wanted or wanted in kept) and run.done("survey", fingerprint(*_surveyed(run, kept)), ["survey.parquet"]):
        return kept
    cards = [registry.MEASURES.card(n) for n in registry.MEASURES]
    usual = [c for c in cards if c.needs is Need.FORWARD and c.status is Status.STABLE]
    cheap = [c.name for c in usual if set(c.on) <= SUBLAYERS | {Kind.BLOCK}]
    return [*([wanted] if wanted and wanted not in cheap else []), *cheap]


def plan(run: Run) -> Plan:
    """Choose what goes, within the budget, and say what it is expected to cost."""
    row, recipe = registry.row(run.recipe.name), run.recipe
    survey_ = run.path(SURVEY)
    if row.measure and not survey_.is_file():
        raise InputError("survey.parquet is missing", where=run.folder, hint="run lamina survey first")
    inputs = [
        *([survey_] if row.measure else []),
        run.loaded.fingerprint,
        run.tokens.fingerprint,
        plain(recipe.budget),
        recipe.name,
        plain(recipe.planner_options),
        plain(options_of(run, row.measure)),
        recipe.refit,
        recipe.dtype,
        recipe.seed,
    ]
    with run.verb("plan", inputs, ["plan.yaml"]) as work:
        if work:
            journal = run.state / f"judged-{fingerprint(*inputs)[7:23]}.json"
            steps, expects = choose(run, journal)
            made = Plan(model=run.ref, recipe=recipe.name, budget=recipe.budget, steps=steps, expects=expects)
            made.save(run.path("plan.yaml"))
            for done in run.state.glob("judged-*.json"):
                done.unlink()
    return run.plan()


def apply(run: Run) -> Receipts:
    """Do what the plan says, check that the result reloads, and publish it as `model/`."""
    plan_ = run.plan()
    inputs = [run.path("plan.yaml"), run.loaded.fingerprint, run.tokens.fingerprint, run.recipe.dtype, run.recipe.seed]
    with run.verb("apply", inputs, ["receipts.json", "model"]) as work:
        if work:
            model, receipts = rewritten(run, plan_)
            mark = fingerprint(run.path("plan.yaml"))
            _publish(run, model, Receipts(model=run.ref, plan=mark, receipts=receipts))
    return run.receipts()


def rewritten(run: Run, plan_: Plan) -> tuple[Any, tuple[Receipt, ...]]:
    """A thinned copy of the dense model, and the receipts; the dense one stays as it is."""
    import copy

    from lamina.lab import Lab

    run.say(f"applying {len(plan_.steps)} steps")
    model = copy.deepcopy(run.loaded.model)
    text = run.tokens.calibration if informed(plan_.steps) else run.tokens.calibration[:1]
    lab = Lab(model, text, seed=run.recipe.seed, progress=run.progress)
    receipts = [registry.rewrite_of(step).apply(step, lab) for step in merged(plan_.steps, lab)]
    return model, tuple(receipts)


def _publish(run: Run, model: Any, receipts: Receipts) -> None:
    """Write the checkpoint aside, check it in a fresh process, and only then put it in place."""
    from lamina.evaluators.reload import contract
    from lamina.exporters.hf import save_checkpoint

    draft, dense = run.state / "draft", run.loaded
    shutil.rmtree(draft, ignore_errors=True)
    about: dict[str, Any] = {"name": dense.name, "budget": run.plan().budget, "healed": summary(receipts.healed)}
    try:
        save_checkpoint(model, receipts.receipts, dense.tokenizer, draft, **about)
        run.say("checking that the checkpoint reloads in a fresh process")
        proof = contract(draft, model, run.tokens.calibration[:2, :32])
        EvidenceFile(evidence=tuple(proof)).save(run.state / "contract.json")
        run.publish(draft, receipts)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    run.adopt(model)


def applied(run: Run) -> Receipts:
    """The receipts, if they are the plan's. Raises InputError where the plan was changed and not applied."""
    receipts = run.receipts()
    run.plan()
    if receipts.plan != fingerprint(run.path("plan.yaml")):
        raise InputError("the plan was changed after it was applied", where=run.folder, hint="run lamina apply first")
    return receipts


def heal(run: Run) -> Receipts:
    """Train the thinned model towards the dense one, by the recipe's budget; without one, do nothing.

    It always begins with what the plan makes of the dense model, also where `model/` has been healed before.
    """
    if run.recipe.heal is None:
        return run.receipts()
    wanted, found = run.recipe.heal, applied(run)
    start = dataclasses.replace(found, healed={})
    inputs = [plain(start), plain(wanted), run.tokens.fingerprint, run.recipe.dtype, run.recipe.seed]
    with run.verb("heal", inputs, ["receipts.json", "model"]) as work:
        if work:
            from lamina.lab import Lab

            ours = run.built and not found.healed  # what is read back carries its receipts already
            model = run.thinned if ours else rewritten(run, run.plan())[0]
            run.adopt(None)  # it is changed in place: should anything fail, model/ is the thinned model
            lab = Lab(model, run.tokens.calibration, seed=run.recipe.seed, progress=run.progress)
            healer = registry.HEALERS.make(wanted.healer, seeded(registry.HEALERS, wanted.healer, run, wanted.options))
            run.say(
                f"healing by {wanted.healer}: {wanted.steps or wanted.minutes} {'steps' if wanted.steps else 'minutes'}"
            )
            budget = {"steps": wanted.steps, "minutes": wanted.minutes}
            history = healer.heal(lab, teacher=run.loaded.model, state_dir=_sitting(run, inputs), **budget)
            healed = {
                "healer": wanted.healer,
                "steps": history.steps,
                "tokens": history.tokens,
                "history": history.losses,
            }
            _publish(run, model, dataclasses.replace(start, healed=healed))
            run.hand_on("apply")
    shutil.rmtree(run.state / "heal", ignore_errors=True)
    return run.receipts()


def _sitting(run: Run, inputs: Sequence[object]) -> Path:
    """Where this healing's state is kept; that of others is of no use any more."""
    folder = run.state / "heal"
    own = folder / fingerprint(*inputs)[7:23]
    for other in folder.glob("*"):
        if other != own:
            shutil.rmtree(other, ignore_errors=True)
    own.mkdir(parents=True, exist_ok=True)
    sweep(own)
    return own


EVALUATORS = ("quality", "size", "speed", "memory")


def prove(run: Run, tasks: str | None = None, items: int = ITEMS) -> EvidenceFile:
    """Measure on held-out text what the plan cost, dense and thinned side by side; and by `tasks`, if any are named.

    `tasks` are names between commas or `offline`, of each at most `items` items. Without it tasks that were done on the
    same models stay. Raises InputError for an unknown task, before any work.
    """
    receipts = applied(run)
    inputs = [plain(receipts), run.tokens.fingerprint, EVALUATORS, run.recipe.dtype, run.recipe.seed]
    asked = proving.asked(run, tasks, items, inputs)
    with run.verb("prove", [*inputs, *asked.inputs], ["evidence.json"], **asked.facts(inputs)) as work:
        if work:
            found = proving.measured(run, inputs, lambda: _measure(run, receipts)) if asked else _measure(run, receipts)
            said = notes(run, receipts)
            if asked:
                rows, lines = proving.answered(run, asked, receipts)
                found, said = (*found, *rows), (*said, *lines)
            EvidenceFile(evidence=tuple(found), notes=said).save(run.path("evidence.json"))
            proving.forget(run)
    return run.evidence()


def _measure(run: Run, receipts: Receipts) -> tuple[Evidence, ...]:
    """What the evaluators find, what the plan expected, and the reload contract."""
    from lamina.lab import Lab

    lab = Lab(run.thinned, run.tokens.heldout, seed=run.recipe.seed, progress=run.progress)
    found: list[Evidence] = _expected(run)
    gone = tuple(s for r in receipts.receipts if r.rewrite == "drop" for s in r.sites)
    for name in EVALUATORS:
        run.say(f"measuring {name}")
        given = {**fitting(run.loaded.model, name), **({"gone": gone} if name == "speed" else {})}
        evaluator = registry.EVALUATORS.make(name, seeded(registry.EVALUATORS, name, run, given))
        found += evaluator.evaluate(lab, reference=run.loaded.model)
    contract = run.state / "contract.json"
    return (*found, *(EvidenceFile.load(contract).evidence if contract.is_file() else ()))


def _expected(run: Run) -> list[Evidence]:
    """What the planner expected; nothing of a plan that was edited or written by hand."""
    loss = run.plan().expects.get("loss")
    if loss is None or run.noted("plan") is None or run.changed("plan"):
        return []
    how = "the plan's expectation, measured on calibration text"
    found = Evidence(
        name="expected_loss", value=loss, unit="nats/token", of="difference",
        n=len(run.tokens.calibration), seed=run.recipe.seed, how=how,
    )  # fmt: skip
    return [found]


def notes(run: Run, receipts: Receipts) -> tuple[str, ...]:
    """Which engine loads the checkpoint, truthfully; and what rewrites say that costs do not."""
    from lamina.exporters.verdict import verdicts

    return (*verdicts(receipts.receipts, run.thinned), *remarks(receipts))


def remarks(receipts: Receipts) -> tuple[str, ...]:
    """What rewrites say of their receipts that costs do not."""
    known = set(registry.REWRITES)
    methods = [
        (getattr(registry.REWRITES.method(r.rewrite), "remarks", None), r)
        for r in receipts.receipts
        if r.rewrite in known
    ]
    said = (line for remarks, r in methods if remarks for line in remarks(r))
    return tuple(dict.fromkeys(said))


def thin(run: Run) -> Run:
    """All verbs in order but the report, which needs only the folder."""
    check(run)
    survey(run)
    plan(run)
    apply(run)
    heal(run)
    prove(run)
    if run.recipe.gguf:
        with run.verb("export", [plain(run.receipts())], ["model.gguf"]) as work:
            if work:
                export(run, kind="gguf")
    return run
