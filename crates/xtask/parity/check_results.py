"""What a training run leaves, read by the programs that it is for: TensorBoard's events, and adapters of PEFT that go in
and come out again. check_parity.py calls it."""

import json

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
META_PROMPT = "# Dromedary\n\n### User\n"
ROWS = [
    ("Why is the sky dark at night?", "", "Since the universe is young and grows."),
    ("Translate this.", "Guten Morgen", "Good morning.\n\n### User\n"),
    ("Name three uses of a brick.", "", "A wall, a doorstop, and a paperweight."),
]
TAGS = {
    "train/loss": lambda step: step["loss"],
    "train/learning_rate": lambda step: step["learning_rate"],
    "train/grad_norm": lambda step: step["grad_norm"],
    "train/epoch": lambda step: step["epoch"],
    "train/tokens_per_second": lambda step: step["tokens"] / step["seconds"],
    "eval/loss": lambda step: step.get("eval_loss"),
}
# The loss is a mean over some dozens of tokens in f32.
LOSS_TOLERANCE = 1e-5


def write_inputs(folder):
    dataset, meta_prompt = folder / "rows.json", folder / "one_prompt.txt"
    dataset.write_text(json.dumps([
        {"example_id": i + 1, "instruction": instruction, "input": context, "output": output}
        for i, (instruction, context, output) in enumerate(ROWS)
    ]))
    meta_prompt.write_text(META_PROMPT)
    return ["--dataset", dataset, "--meta-prompt-pattern", meta_prompt, "--add-eos-to-target", "false"]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_events(checks, run, name, checkpoint, folder):
    """Events of a run that went on from a checkpoint, against its metrics.jsonl."""
    inputs, output = write_inputs(folder), folder / "events"
    train = ["step3-principle-engraving", "train", "--checkpoint", checkpoint, *inputs, "--output-dir", output, "--lora-r", 2,
             "--eval-dataset", folder / "rows.json", "--eval-steps", 2, "--max-steps", 5, "--save-steps", 2,
             "--gradient-accumulation-steps", 1]
    run(*train)
    # As a kill behind step 4 leaves it.
    for path in output.glob("checkpoint-5/*"):
        path.unlink()
    (output / "checkpoint-5").rmdir()
    run(*train)
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    metrics = metrics_of(output)
    tags = sorted(events.Tags()["scalars"])
    checks.line(tags == sorted(TAGS), f"{name}: TensorBoard finds the scalars {', '.join(tags)}")
    for tag, value in TAGS.items():
        want = [(step["step"], value(step)) for step in metrics if value(step) is not None]
        got = [(event.step, event.value) for event in events.Scalars(tag)]
        same = [s for s, _ in got] == [s for s, _ in want] and all(
            torch.tensor(a).float() == torch.tensor(b).float() for (_, a), (_, b) in zip(got, want))
        checks.line(same, f"{name}: {tag} of {len(got)} steps as in metrics.jsonl")


def token_rows(checkpoint):
    """(ids, tokens of the source) of each row, by transformers' tokenizer and Dromedary's way of encoding a target."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    encode = lambda text, special=False: tokenizer.encode(text, add_special_tokens=special).ids  # noqa: E731
    # A sentencepiece vocabulary puts a space before each text, which encoding a newline before the target takes off again.
    before = "\n" if tokenizer.token_to_id("▁") is not None else ""
    for instruction, context, output in ROWS:
        middle = f"{instruction}\n\n{context}" if context else instruction
        source = encode(f"{META_PROMPT.strip()}\n{middle}\n\n### Dromedary", special=True)
        target = encode(f"{before}\n{output}")[len(encode(before)):]
        yield source + target, len(source)


def loss_of(model, rows):
    total, count = 0.0, 0
    for ids, source in rows:
        logits = model(torch.tensor([ids])).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits[source - 1:-1], torch.tensor(ids[source:]), reduction="sum"))
        count += len(ids) - source
    return total / count


def make_adapter(checkpoint, folder, **settings):
    """An adapter as PEFT writes it, none of whose factors is zero. The seed is also that of PEFT's lora_A."""
    torch.manual_seed(5)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
                           LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, bias="none", **settings))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)


def check_adapters(checks, run, name, checkpoint, folder):
    """An adapter of PEFT goes in, its loss is PEFT's, and what comes out has equal logits in PEFT."""
    inputs, rows = write_inputs(folder), list(token_rows(checkpoint))
    cases = {
        "plain": {"r": 4, "lora_alpha": 8, "target_modules": MODULES},
        "scaled by the root of r": {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    }
    for case, settings in cases.items():
        adapter, output = folder / f"peft {case}", folder / f"ours {case}"
        make_adapter(checkpoint, adapter, **settings)
        run("step3-principle-engraving", "train", "--checkpoint", checkpoint, *inputs, "--output-dir", output, "--adapter", adapter,
            "--learning-rate", 0, "--max-steps", 1, "--gradient-accumulation-steps", len(ROWS))
        base = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        plain_loss = loss_of(base, rows)
        model = PeftModel.from_pretrained(base, adapter, adapter_name="theirs").eval()
        theirs, want = [model(torch.tensor([ids])).logits for ids, _ in rows], loss_of(model, rows)
        got = metrics_of(output)[0]["loss"]
        checks.line(abs(want - plain_loss) > 100 * LOSS_TOLERANCE * want, f"{name}, {case}: the adapter moves the loss from {plain_loss:.4f}")
        checks.within(f"{name}, {case}: our loss with PEFT's adapter, {got:.6f}", abs(got - want) / want, LOSS_TOLERANCE)
        model.load_adapter(output / "adapter", adapter_name="ours")
        model.set_adapter("ours")
        same = all(torch.equal(a, model(torch.tensor([ids])).logits) for a, (ids, _) in zip(theirs, rows))
        checks.line(same, f"{name}, {case}: our copy of the adapter has the same logits in PEFT, to the bit")
        ours, original = (load_file(path / "adapter_model.safetensors") for path in (output / "adapter", adapter))
        checks.line(ours.keys() == original.keys() and all(torch.equal(ours[n], t) for n, t in original.items()),
                    f"{name}, {case}: the same {len(original)} tensors")


def check(checks, run, name, checkpoint, folder):
    check_events(checks, run, name, checkpoint, folder)
    check_adapters(checks, run, name, checkpoint, folder)
