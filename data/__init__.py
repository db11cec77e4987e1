"""From instruction JSON and images to micro-batches. Knows nothing of `reduction` and `train`.

processor.image_processor = build_image_processor(processor.image_processor.to_dict(), "llava")
processor.chat_template = choose_template(processor, "auto")
drops = DropLog(on_bad_sample="skip", max_bad_fraction=0.01)
conversations = read_instructions("llava_v1_5_mix665k.json", drops=drops)
supervision = Supervision(processor, max_length=2048)
dataset = ConversationDataset(conversations, supervision, "images/", drops=drops, cache_dir="cache/")

plan = BatchPlan(dataset.lengths, 128, seed=0, num_epochs=1, num_processes=2, micro_batch_size=8)
sampler = MicroBatchSampler(plan, process_index=0, position=0)
micro_batches = iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=Collator.of(supervision)))
for batch in plan.batches(position=0):  # one optimizer step each; batch.next_position goes into the checkpoint
    for _ in batch.micro_batches[0]:  # as many on every process
        micro = next(micro_batches)  # micro.inputs: the model's keyword arguments; micro.sample_ids
        drops.extend(micro.dropped)
drops.check(seen=batch.next_position)
drops.write("dropped.jsonl")
"""

from shortzip.data.batching import BatchPlan, GlobalBatch, MicroBatchSampler
from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch, Sample
from shortzip.data.drops import BadSample, Drop, DropLog, TooManyBadSamples
from shortzip.data.images import BadImage, build_image_processor, open_image
from shortzip.data.instructions import Conversation, UnknownFormat, read_instructions
from shortzip.data.supervision import Encoded, Supervision, choose_template, load_template

__all__ = [
    "BadImage",
    "BadSample",
    "BatchPlan",
    "Collator",
    "Conversation",
    "ConversationDataset",
    "Drop",
    "DropLog",
    "Encoded",
    "GlobalBatch",
    "MicroBatch",
    "MicroBatchSampler",
    "Sample",
    "Supervision",
    "TooManyBadSamples",
    "UnknownFormat",
    "build_image_processor",
    "choose_template",
    "load_template",
    "open_image",
    "read_instructions",
]
