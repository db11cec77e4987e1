"""Accuracy against cost: VisionZip budgets x frozen layers and the baselines at equal tokens, untuned and tuned.

    python scripts/frontier.py                                   # the demo: configs/eval/frontier-demo.yaml
    python scripts/frontier.py --recipe configs/MY.yaml --budgets '[162+30, 108+20, 54+10]' --freeze '["0", "60%"]'

Writes `output`/frontier.json, frontier.png (accuracy against LLM FLOPs and against measured prefill time), table.md.
With `tune`, each point is also tuned by the recipe, once per seed. Every evaluation and every tuned run is kept: the
same command continues after an interruption. Prefill times are comparable when nothing else runs on the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from reduction.parsing import parse_budget
from train.checkpoint import write_atomically
from train.command_line import dump_config, load_config, parse_config
from train.comparison import Candidate, check_candidates, compare, prefill_times
from train.config import DEMO, ConfigError, DataConfig, FastVConfig, ShortVConfig, TuneConfig, VisionZipConfig
from train.frontier_report import GRID_OF_POINTS, draw, show, summarise
from train.release import dtype_of, open_release
from train.run_folder import FINAL, STATUS, read_status
from train.samples import choose_layers, demo_folder, draw_demo_scenes

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT / "configs" / "eval" / "frontier-demo.yaml"
DOMINANT_ONLY = "dominant only"
DRAWN = ("random", "random layers")


@dataclass(frozen=True)
class FrontierConfig:
    """Settings of scripts/frontier.py."""

    recipe: str
    """The YAML of a run: release, data and how to tune."""
    output: str
    """Folder of everything that is written."""
    budgets: list[str] = field(default_factory=list)
    """Budgets (dominant+contextual), each with each of `freeze`. The first is the one the baselines are held to."""
    freeze: list[str] = field(default_factory=lambda: ["0"])
    """How many layers to freeze, as numbers or shares; those with the lowest LC. The last is the one that rankings are
    compared at."""
    methods: list[str] = field(default_factory=list)
    """Baselines with as many tokens as the first budget: random, grid, pool, downsample, and "dominant only"."""
    fastv: list[FastVConfig] = field(default_factory=list)
    """FastV baselines, on all tokens."""
    rankings: list[str] = field(default_factory=list)
    """Other rankings of the layers to freeze, on all tokens, beside lc: cosine, random."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of what is drawn at random, and of tuning."""
    tune: bool = False
    """Also tune each point by the recipe, once per seed."""
    prefill_rounds: int = 3
    """How often prefill is timed: a round times every untuned point once, so that a slower moment is so for all."""
    samples: int | None = None
    """Only the first so many held-out conversations; null: as the recipe says."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("seeds is empty: at least one is needed")
        if self.prefill_rounds < 1:
            raise ConfigError(f"prefill_rounds is {self.prefill_rounds}: at least 1 is needed")
        if not self.freeze:
            raise ConfigError("freeze is empty: give at least one number of layers, 0 to freeze none")
        known = ("random", "grid", "pool", "downsample", DOMINANT_ONLY)
        for value, allowed in ((self.methods, known), (self.rankings, ("cosine", "random"))):
            bad = [entry for entry in value if entry not in allowed]
            if bad:
                raise ConfigError(f"{bad[0]!r} is none of {', '.join(allowed)}")
        if self.methods and not self.budgets:
            raise ConfigError("methods are held to the first budget, and budgets is empty")


@dataclass(frozen=True)
class Point:
    """A point of the frontier: a reduction, and the seed of what it draws or was tuned with."""

    series: str
    """What it is called in table and picture; points that differ in their seed alone share it."""
    budget: str
    """all, or dominant+contextual."""
    frozen: int
    visionzip: dict[str, Any] | None
    layers: tuple[int, ...]
    fastv: dict[str, Any] | None = None
    seed: int | None = None
    tuned: bool = False

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def name(self) -> str:
        """A folder's name, unlike every other point's."""
        fastv = f"-{self.fastv['layer']}-{self.fastv['keep']:g}" if self.fastv else ""
        parts = [self.series + fastv, self.budget, f"{self.frozen} frozen"]
        parts += [] if self.seed is None else [f"seed {self.seed}"]
        text = ", ".join([*parts, "tuned"] if self.tuned else parts)
        return "".join(letter if letter.isalnum() or letter in "+-." else "-" for letter in text)


def points_of(config: FrontierConfig, layers: Mapping[tuple[str, str, int], Sequence[int]]) -> list[Point]:
    """All points, untuned. `layers`: by ranking, `freeze` and seed."""
    points = [Point("all tokens", "all", 0, None, ())]
    for freeze in config.freeze:
        for budget in ["all", *config.budgets]:
            chosen = tuple(layers["lc", freeze, config.seeds[0]])
            visionzip = None if budget == "all" else parse_budget(budget)
            if visionzip or chosen:
                points.append(Point(GRID_OF_POINTS, budget, len(chosen), visionzip, chosen))
    for method in config.methods:
        count = sum(parse_budget(config.budgets[0]).values())
        for seed in config.seeds if method in DRAWN else [None]:
            drawn = {} if seed is None else {"seed": seed}
            kind = {} if method == DOMINANT_ONLY else {"method": method}
            visionzip = {"dominant": count, "contextual": 0, **kind, **drawn}
            points.append(Point(method, f"{count}+0", 0, visionzip, (), seed=seed))
    points += [Point("FastV", "all", 0, None, (), fastv=asdict(fastv)) for fastv in config.fastv]
    for ranking in config.rankings:
        freeze = config.freeze[-1]
        for seed in config.seeds if ranking == "random" else [None]:
            chosen = tuple(layers[ranking, freeze, config.seeds[0] if seed is None else seed])
            points.append(Point(f"{ranking} layers", "all", len(chosen), None, chosen, seed=seed))
    return points


def tuned_points(config: FrontierConfig, points: Sequence[Point]) -> Iterator[Point]:
    """Each point tuned, once per seed; what a point draws, it draws with that seed."""
    done = set()
    for point in points:
        for seed in config.seeds:
            if point.seed in (None, seed):
                tuned = replace(point, seed=seed, tuned=True)
                if tuned not in done:
                    done.add(tuned)
                    yield tuned


def layers_to_freeze(config: FrontierConfig, recipe: TuneConfig) -> dict[tuple[str, str, int], list[int]]:
    """The layers of every ranking, number and seed that `points_of` asks for.

    They are kept in frozen-layers.json beside what they were measured with, and measured again when that has changed.
    """
    path = Path(config.output) / "frozen-layers.json"
    known_settings = recipe.shortv or ShortVConfig(freeze=1)
    measured_with = json.loads(
        json.dumps(
            {
                **{key: getattr(recipe, key) for key in ("model", "revision", "mm_projector", "vision_tower")},
                "visionzip": recipe.visionzip and asdict(recipe.visionzip),
                "data": asdict(recipe.data),
                "calibration_samples": known_settings.calibration_samples,
            }
        )
    )
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = kept["layers"] if kept.get("measured_with") == measured_with else {}
    accelerator = Accelerator()
    release = open_release(
        recipe.model, recipe.revision, mm_projector=recipe.mm_projector, vision_tower=recipe.vision_tower
    )
    wanted = [("lc", freeze, config.seeds[0]) for freeze in config.freeze]
    for ranking in config.rankings:
        seeds = config.seeds if ranking == "random" else config.seeds[:1]
        wanted += [(ranking, config.freeze[-1], seed) for seed in seeds]
    found = {}
    for ranking, freeze, seed in wanted:
        key = f"{ranking} {freeze} {seed}"
        if key not in known:
            known[key] = []
            if freeze not in ("0", "0%"):
                shortv = ShortVConfig(
                    freeze=freeze,
                    ranking=ranking,  # type: ignore[arg-type]  # one of the Literal's, as the config checks
                    calibration_samples=known_settings.calibration_samples,
                )
                folder = Path(config.output) / "layers"
                folder.mkdir(parents=True, exist_ok=True)
                asked = replace(recipe, shortv=shortv, fastv=None, seed=seed, output_dir=str(folder))
                known[key] = choose_layers(asked, release, dtype_of(recipe.mixed_precision), accelerator) or []
            write_atomically(path, json.dumps({"measured_with": measured_with, "layers": known}, indent=1) + "\n")
        found[ranking, freeze, seed] = known[key]
    return found


def tune_point(point: Point, config: FrontierConfig, recipe: TuneConfig) -> Path:
    """The run's folder of a tuned point: tuned now, or continued, unless it is finished by the same recipe.

    Raises RuntimeError, with the end of its output, when the run fails.
    """
    folder = Path(config.output) / "runs" / point.name
    run = replace(
        recipe,
        visionzip=VisionZipConfig(**point.visionzip) if point.visionzip else None,
        shortv=ShortVConfig(layers=list(point.layers)) if point.layers else None,
        fastv=FastVConfig(**point.fastv) if point.fastv else None,
        seed=point.seed or 0,
        output_dir=str(folder),
        run_name=None,
        overwrite_output_dir=False,
        resume_from_checkpoint=None,
        final_evaluation=False,
        control=False,
        eval_steps=None,
        pictures=0,
        save_total_limit=1,
        report_to=[],
        push_to_hub=False,
        hub_model_id=None,
    )
    given, text = Path(config.output) / "recipes" / f"{point.name}.yaml", dump_config(run)
    is_begun = given.is_file() and given.read_text(encoding="utf-8") == text and (folder / STATUS).is_file()
    if is_begun and read_status(folder)["state"] == "finished":
        return folder
    given.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(given, text)
    how = ["--resume_from_checkpoint", "latest"] if is_begun else ["--overwrite_output_dir", "true"]
    command = [sys.executable, str(ROOT / "train" / "tune_projector.py"), "--config", str(given), *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"tuning {point.name} ended with {done.returncode}:\n{tail}")
    return folder


def candidate_of(point: Point, model: str, recipe: TuneConfig) -> Candidate:
    """What is evaluated of a point: `model` is the recipe's, or of a tuned point its checkpoint."""
    return Candidate(
        point.name,
        model,
        visionzip="saved" if point.tuned else point.visionzip,
        shortv="saved" if point.tuned else ({"layers": list(point.layers)} if point.layers else None),
        fastv="saved" if point.tuned else point.fastv,
        revision=None if point.tuned else recipe.revision,
        mm_projector=None if point.tuned else recipe.mm_projector,
        vision_tower=None if point.tuned else recipe.vision_tower,
        chat_template=recipe.data.chat_template,
    )


def evaluate_point(
    point: Point, model: str, config: FrontierConfig, recipe: TuneConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """The point's values; kept from before where model, reduction, settings and conversations are the same."""
    data, candidate = held_out_data(config, recipe), candidate_of(point, model, recipe)
    settings = (
        recipe.mixed_precision,
        recipe.load_in_4bit,
        recipe.eval_batch_size,
        recipe.max_new_tokens,
        str(accelerator.device),
    )
    weights = sorted(Path(model).rglob("*.safetensors")) if Path(model).is_dir() else []
    files = [(file.name, file.stat().st_mtime_ns) for file in weights]
    identity = repr((asdict(candidate), asdict(data), settings, _stamp(data), files))
    kept = Path(config.output) / "points" / f"{point.name}.json"
    if kept.is_file():
        entry = json.loads(kept.read_text(encoding="utf-8"))
        if entry["identity"] == identity:
            return entry
    found = compare(
        [candidate],
        data,
        accelerator,
        dtype=dtype_of(recipe.mixed_precision),
        load_in_4bit=recipe.load_in_4bit,
        batch_size=recipe.eval_batch_size,
        max_new_tokens=recipe.max_new_tokens,
        answers=Path(config.output) / "answers",
    )[0]
    entry = {"point": asdict(point), "evaluation": asdict(found), "identity": identity}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps(entry, indent=1) + "\n")
    return entry


def time_prefill(
    points: Sequence[Point],
    entries: Sequence[dict[str, Any]],
    config: FrontierConfig,
    recipe: TuneConfig,
    accelerator: Accelerator,
) -> None:
    """Sets the entries' prefill time to one measured side by side; kept until one of the points is another."""
    path = Path(config.output) / "prefill.json"
    identity = [config.prefill_rounds, *(entry["identity"] for entry in entries)]
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("identity") != identity:
        print("prefill of all untuned points, side by side", flush=True)
        times = prefill_times(
            [candidate_of(point, recipe.model, recipe) for point in points],
            held_out_data(config, recipe),
            accelerator,
            dtype=dtype_of(recipe.mixed_precision),
            load_in_4bit=recipe.load_in_4bit,
            batch_size=recipe.eval_batch_size,
            rounds=config.prefill_rounds,
        )
        kept = {"identity": identity, "prefill_ms": times}
        write_atomically(path, json.dumps(kept, indent=1) + "\n")
    for entry, milliseconds in zip(entries, kept["prefill_ms"], strict=True):
        entry["evaluation"]["prefill_ms"] = milliseconds


def held_out_data(config: FrontierConfig, recipe: TuneConfig) -> DataConfig:
    """The recipe's held-out conversations, or the first of them."""
    return recipe.data if config.samples is None else replace(recipe.data, eval_samples=config.samples)


def _stamp(data: DataConfig) -> tuple[int, int] | None:
    """What changes when the file of held-out conversations does; None where they are no file."""
    assert data.eval_instructions is not None
    file = Path(data.eval_instructions)
    if data.eval_instructions == DEMO:
        file = demo_folder(data.demo_scenes, held_out=True) / "instructions.json"
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None


def main(argv: Sequence[str]) -> None:
    try:
        config = parse_config(FrontierConfig, argv, default=DEFAULT, program="frontier.py")
        recipe = load_config(["--config", config.recipe])
        if recipe.data.eval_instructions is None:
            raise ConfigError(f"{config.recipe} names no held-out conversations: data.eval_instructions is needed")
        output, accelerator = Path(config.output), Accelerator()
        output.mkdir(parents=True, exist_ok=True)
        draw_demo_scenes(recipe.data)
        unfrozen = points_of(config, defaultdict(list))  # before layers are measured, which takes its time
        check_candidates([candidate_of(point, recipe.model, recipe) for point in unfrozen])
        points = points_of(config, layers_to_freeze(config, recipe))
    except (OSError, ValueError) as error:  # a ConfigError too
        sys.exit(f"error: {error}")
    if config.tune:
        points += tuned_points(config, points)
    entries = []
    for number, point in enumerate(points, start=1):
        print(f"[{number}/{len(points)}] {point.name}", flush=True)
        model = recipe.model
        if point.tuned:
            try:
                model = str(tune_point(point, config, recipe) / FINAL)
            except RuntimeError as error:
                sys.exit(f"error: {error}")
        entries.append(evaluate_point(point, model, config, recipe, accelerator))
    untuned = [point for point in points if not point.tuned]
    time_prefill(untuned, entries[: len(untuned)], config, recipe, accelerator)
    rows = summarise(entries)
    write_atomically(output / "table.md", show(rows))
    draw(rows, output / "frontier.png")
    plain = [{**asdict(row), "mean": row.mean, "spread": row.spread} for row in rows]
    is_cuda = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} threads"
    report = {"recipe": config.recipe, "model": recipe.model, "device": device, "seeds": config.seeds, "rows": plain}
    write_atomically(output / "frontier.json", json.dumps(report, indent=1) + "\n")
    print(f"written: {output / 'frontier.json'}, {output / 'frontier.png'}, {output / 'table.md'}")


if __name__ == "__main__":
    main(sys.argv[1:])
