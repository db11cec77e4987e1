"""What an engine does with one update, in processes of its own: run under torchrun by test_engines.py.

    torchrun --nproc_per_node 2 engine_probe.py RELEASE INSTRUCTIONS bf16|no

Fails if an update that should be skipped changes anything, or if the next one is not as if nothing had happened.
"""

import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from shortzip.data.dataset import Collator, ConversationDataset
from shortzip.data.instructions import read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import load_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.run.processes import start_accelerator
from shortzip.train.settings.config import DataConfig, TuneConfig
from shortzip.train.step.engine import WholeEngine
from shortzip.train.step.engine_choice import start_engine
from shortzip.train.step.objective import SupervisedLoss, projector_parameters, train_only_projector

State = dict[str, torch.Tensor]


def build(accelerator: Accelerator, release: str, dtype: torch.dtype) -> WholeEngine:
    model, _ = load_release(
        ReleaseSpec(release, dtype=dtype), Reductions({"dominant": 4, "contextual": 2}, {"layers": [1]})
    )
    train_only_projector(model, dtype)
    parameters = projector_parameters(model)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    adamw = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0)
    return start_engine(accelerator, SupervisedLoss(model), adamw, parameters, 1.0)


def main(release: str, instructions: str, mixed_precision: str) -> None:
    data = DataConfig(instructions=instructions)
    config = TuneConfig(model=release, data=data, mixed_precision=mixed_precision)  # type: ignore[arg-type]
    accelerator = start_accelerator(config)
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    _, processor = load_release(release, Reductions({"dominant": 4, "contextual": 2}))
    dataset = ConversationDataset(
        read_instructions(Path(instructions)), Supervision(processor), Path(instructions).parent
    )
    collate = Collator.of(dataset.supervision)
    # The second process has text alone in its first micro-batch, and nothing at all in its second.
    rows = [[0, 1], [2]] if accelerator.process_index == 0 else [[4], []]
    batches = [collate([dataset[index] for index in chosen]).to(accelerator.device) for chosen in rows]

    def step(engine: WholeEngine, *, finite: bool = True, factor: float = 1.0) -> tuple[float, State]:
        for number, batch in enumerate(batches):
            engine.backward(batch, factor / 20, last=number == len(batches) - 1)
        norm = engine.update(finite=finite)
        return norm, {**engine.projector(), **{key: value.clone() for key, value in engine.moments().items()}}

    def same(found: State, expected: State) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    engine = build(accelerator, release, dtype)
    exact = {name: tensor.clone() for name, tensor in engine.projector().items()}
    release_values = projector_parameters(load_release(release, Reductions())[0])
    same(exact, {name: tensor.detach() for name, tensor in release_values.items()})  # in bf16 too: no bit is lost
    assert engine.moments() == {}
    norm, first = step(engine)
    assert math.isfinite(norm)
    assert norm > 0.01
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    first = {name: tensor.clone() for name, tensor in first.items()}
    same(step(engine, finite=False)[1], first)
    norm, after = step(engine, factor=math.nan)
    assert not math.isfinite(norm)
    same(after, first)
    norm, _ = step(engine, factor=math.inf)
    assert not math.isfinite(norm)
    _, second = step(engine)
    second = {name: tensor.clone() for name, tensor in second.items()}

    # Another engine that begins where this one stood after its first update comes to the same second one.
    accelerator.free_memory()
    fresh = build(accelerator, release, dtype)
    fresh_first = {name: tensor.clone() for name, tensor in step(fresh)[1].items()}
    same(fresh_first, first)
    same(step(fresh)[1], second)
    accelerator.free_memory()
    if accelerator.is_main_process:
        print(f"probed {type(engine).__name__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
